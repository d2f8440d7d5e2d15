"""A llama2.c checkpoint (the headerless-magic fp32 format, "version 0") as a Checkpoint.

Layout: `legacy_export` in llama2.c's `export.py`: seven int32, then float32 arrays, each
holding all layers. Here every layer's matrix is a tensor of its own, `layers.3.wq` say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import CorruptWeights
from core.weights.checkpoint import Place
from core.weights.finite import require_finite
from core.weights.mapped_file import MappedFile, WeightFile
from core.weights.readings import Readings

_HEADER = struct.Struct("<7i")
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_VERSIONED_MAGIC = b"24ka"  # 0x616b3432 of export.py's versions 1 and 2, little-endian
_MAX_FIELD = 1 << 24


class Llama2cCheckpoint:
    """An open llama2.c file; see `Checkpoint` for the promises.

    `metadata` has the header's fields by llama2.c's names, `vocab_size` positive, and
    `shared_classifier` (the file's sign of vocab_size).
    """

    format = "llama2c"

    def __init__(self, path: Path, *, file: WeightFile | None = None) -> None:
        """`file` is the one at `path`, if it is open already. Raises NotFound or CorruptWeights."""
        self.path = path
        self._readings = Readings()
        self._file = file or MappedFile(path)
        try:
            self.metadata: Mapping[str, int] = _read_header(self._file)
            self._tensors = _lay_out(self._file, self.metadata)
        except CorruptWeights:
            self._file.close()
            raise

    @property
    def bytes_read(self) -> int:
        return self._readings.num_bytes

    def digest_of(self, names: Iterable[str]) -> str:
        return self._readings.digest_of(names)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def size_bytes(self, name: str) -> int:
        return 4 * prod(self.shape(name))

    def place(self, name: str) -> Place:
        return Place(self.path, self._tensors[name][0], self.size_bytes(name))

    def read(self, name: str) -> npt.NDArray[np.float32]:
        offset, shape = self._tensors[name]
        return self._read(name, offset, shape)

    def read_rows(self, name: str, *, first: int, count: int) -> npt.NDArray[np.float32]:
        offset, (_, *row_shape) = self._tensors[name]
        row_bytes = 4 * prod(row_shape)
        return self._read(name, offset, (count, *row_shape), first_byte=first * row_bytes)

    def _read(
        self, name: str, offset: int, shape: tuple[int, ...], *, first_byte: int = 0
    ) -> npt.NDArray[np.float32]:
        num_bytes = 4 * prod(shape)
        offset += first_byte
        raw = self._file.view(offset, num_bytes)
        values = raw.view("<f4").reshape(shape).astype(np.float32)
        self._readings.add(name, raw, first_byte=first_byte)
        del raw
        self._file.release(offset, num_bytes)
        require_finite(values, path=self.path, name=name)
        return values

    def close(self) -> None:
        self._file.close()


def _read_header(file: WeightFile) -> dict[str, int]:
    if file.size_bytes < _HEADER.size:
        raise CorruptWeights(f"{file.path} is too short for a llama2.c header")
    if file.data[:4] == _VERSIONED_MAGIC:
        raise CorruptWeights(
            f"{file.path} is a llama2.c file of version 1 or 2; only version 0 is supported"
        )
    header = dict(zip(_FIELDS, _HEADER.unpack_from(file.data), strict=True))
    header["shared_classifier"] = int(header["vocab_size"] > 0)
    header["vocab_size"] = abs(header["vocab_size"])
    for name in _FIELDS:
        if not 0 < header[name] <= _MAX_FIELD:
            raise CorruptWeights(
                f"{file.path} is not a llama2.c file: its header has {name} {header[name]}"
            )
    if header["dim"] % header["n_heads"] or header["n_heads"] % header["n_kv_heads"]:
        raise CorruptWeights(
            f"{file.path} is not a llama2.c file: {header['n_heads']} heads and "
            f"{header['n_kv_heads']} key-value heads do not divide a width of {header['dim']}"
        )
    return header


def _lay_out(file: WeightFile, header: Mapping[str, int]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns (offset, shape) of every tensor, in the order of the file."""
    width, hidden, layers = header["dim"], header["hidden_dim"], header["n_layers"]
    head_dim = width // header["n_heads"]
    kv_width = header["n_kv_heads"] * head_dim
    per_layer: list[tuple[str, tuple[int, ...]]] = [
        ("rms_att", (width,)),
        ("wq", (width, width)),
        ("wk", (kv_width, width)),
        ("wv", (kv_width, width)),
        ("wo", (width, width)),
        ("rms_ffn", (width,)),
        ("w1", (hidden, width)),
        ("w2", (width, hidden)),
        ("w3", (hidden, width)),
    ]
    rotary_table = (header["seq_len"], head_dim // 2)  # kept by the format, read by nobody
    last: list[tuple[str, tuple[int, ...]]] = [
        ("rms_final", (width,)),
        ("freq_cis_real", rotary_table),
        ("freq_cis_imag", rotary_table),
    ]
    if not header["shared_classifier"]:
        last.append(("wcls", (header["vocab_size"], width)))
    # Checked by arithmetic first: a damaged header may claim millions of layers.
    ends = 4 * (header["vocab_size"] * width + sum(prod(shape) for _, shape in last))
    layer_bytes = 4 * sum(prod(shape) for _, shape in per_layer)
    expected = _HEADER.size + ends + layers * layer_bytes
    if file.size_bytes != expected:
        raise CorruptWeights(
            f"{file.path} has {file.size_bytes} bytes, but its llama2.c header asks for {expected}"
        )
    order: list[tuple[str, tuple[int, ...]]] = [("token_embedding", (header["vocab_size"], width))]
    order += [
        (f"layers.{layer}.{name}", shape) for name, shape in per_layer for layer in range(layers)
    ]
    tensors, offset = {}, _HEADER.size
    for name, shape in order + last:
        tensors[name] = (offset, shape)
        offset += 4 * prod(shape)
    return tensors
