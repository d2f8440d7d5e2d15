"""What every weight file format offers, so that nothing above knows formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class Place(NamedTuple):
    """Where the bytes of a tensor lie."""

    path: Path
    offset: int
    size_bytes: int


class Checkpoint(Protocol):
    """An open, memory-mapped weight file (or folder of shards).

    Opening reads headers only. `read` touches only the bytes of the tensor asked for.
    """

    @property
    def format(self) -> str:
        """ "gguf", "safetensors" or "llama2c"."""
        ...

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF key-values (big arrays, such as the vocabulary, parsed on first access);
        config.json of a Hugging Face folder; the header fields of a llama2.c file."""
        ...

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names as the file has them."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that `read` has touched so far."""
        ...

    def digest_of(self, names: Iterable[str]) -> str:
        """Digest (hex) of the bytes of tensors that have been read: equal for equal weights,
        whatever else the file holds. KeyError where one has not been read."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in C order: [out_features, in_features] for a projection."""
        ...

    def size_bytes(self, name: str) -> int:
        """Bytes of the tensor in the file."""
        ...

    def place(self, name: str) -> Place:
        """The file that has the tensor, and its bytes there."""
        ...

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Reads and dequantises one tensor to float32, C order.

        Raises CorruptWeights when the bytes are missing, of an unsupported type, or not all
        finite numbers; KeyError when there is no such tensor.
        """
        ...

    def read_rows(self, name: str, *, first: int, count: int) -> npt.NDArray[np.float32]:
        """As `read`, but `count` rows of a matrix, from the row `first` on."""
        ...

    def close(self) -> None: ...
