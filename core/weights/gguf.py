"""A GGUF file as a Checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import CorruptWeights
from core.weights.checkpoint import Place
from core.weights.dequantise import dequantise
from core.weights.finite import require_finite
from core.weights.gguf_header import GgufMetadata, read_header
from core.weights.mapped_file import MappedFile, WeightFile
from core.weights.nibbles import NIBBLE_TYPES, Nibbles, decode_nibbles
from core.weights.readings import Readings


class GgufCheckpoint:
    """An open GGUF file. Opening parses the header only; see `Checkpoint` for the promises."""

    format = "gguf"

    def __init__(self, path: Path, *, file: WeightFile | None = None) -> None:
        """`file` is the one at `path`, if it is open already. Raises NotFound or CorruptWeights."""
        self.path = path
        self._readings = Readings()
        self._file = file or MappedFile(path)
        try:
            self._header = read_header(self._file)
        except CorruptWeights:
            self._file.close()
            raise

    @property
    def metadata(self) -> GgufMetadata:
        return self._header.metadata

    @property
    def bytes_read(self) -> int:
        return self._readings.num_bytes

    def digest_of(self, names: Iterable[str]) -> str:
        return self._readings.digest_of(names)

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._header.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header.tensors[name].shape

    def size_bytes(self, name: str) -> int:
        return self._header.tensors[name].size_bytes

    def place(self, name: str) -> Place:
        tensor = self._header.tensors[name]
        return Place(self.path, tensor.offset, tensor.size_bytes)

    def block_type(self, name: str) -> str:
        """Name of the tensor's number format in the file, "Q4_K" say."""
        return self._header.tensors[name].block_type.name

    def read(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self._header.tensors[name]
        return self._read(name, 0, tensor.size_bytes, tensor.shape)

    def read_rows(self, name: str, *, first: int, count: int) -> npt.NDArray[np.float32]:
        tensor = self._header.tensors[name]
        row_bytes = tensor.size_bytes // tensor.shape[0]
        return self._read(name, first * row_bytes, count * row_bytes, (count, *tensor.shape[1:]))

    def has_nibbles(self, name: str) -> bool:
        """Whether the tensor is a matrix whose weights have 4 bits, a scale and a minimum."""
        tensor = self._header.tensors[name]
        return tensor.block_type in NIBBLE_TYPES and len(tensor.shape) == 2

    def read_nibbles(self, name: str, *, first: int, count: int) -> Nibbles:
        """`count` rows of a matrix, from the row `first` on, as the file has them.

        Raises CorruptWeights as `read` does.
        """
        tensor = self._header.tensors[name]
        row_bytes = tensor.size_bytes // tensor.shape[0]
        with self._raw(name, first * row_bytes, count * row_bytes) as raw:
            shape = (count, tensor.shape[1])
            nibbles = decode_nibbles(raw, block_type=tensor.block_type, shape=shape)
        for scales in (nibbles.scales_NG, nibbles.minima_NG):
            require_finite(scales.astype(np.float32), path=self.path, name=name)
        return nibbles

    def _read(
        self, name: str, first_byte: int, num_bytes: int, shape: tuple[int, ...]
    ) -> npt.NDArray[np.float32]:
        tensor = self._header.tensors[name]
        with self._raw(name, first_byte, num_bytes) as raw:
            values = dequantise(raw, block_type=tensor.block_type, shape=shape)
        require_finite(values, path=self.path, name=name)
        return values

    @contextmanager
    def _raw(self, name: str, first_byte: int, num_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Bytes of a tensor; nothing may keep a view of them."""
        offset = self._header.tensors[name].offset + first_byte
        raw = self._file.view(offset, num_bytes)
        self._readings.add(name, raw, first_byte=first_byte)
        yield raw
        del raw
        self._file.release(offset, num_bytes)

    def close(self) -> None:
        self._file.close()
