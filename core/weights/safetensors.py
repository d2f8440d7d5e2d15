"""A Hugging Face folder (config.json and safetensors, whole or in shards) as a Checkpoint.

Format: the safetensors README: eight bytes of header length, a JSON header, the data.
Parsed here rather than by the `safetensors` library because numpy has no bfloat16, and
because a stage must touch only the bytes of its own layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from core.errors import CorruptWeights, NotFound
from core.weights.checkpoint import Place
from core.weights.dequantise import bf16_to_f32
from core.weights.finite import require_finite
from core.weights.mapped_file import MappedFile, WeightFile
from core.weights.readings import Readings

_MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library itself
# Parsed, JSON takes up to thirty times its size. The biggest index and settings have a few MB.
_MAX_JSON_BYTES = 1 << 24
_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_MAX_DIMENSIONS = 8
_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file that is not trusted.

    Raises NotFound when the file is missing, CorruptWeights when it is anything else than a
    JSON object of reasonable size.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptWeights(f"{path} is too big to be a configuration")
        return _parse_json(path.read_bytes(), path)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptWeights(f"{path} has no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptWeights(f"{path} does not hold a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice")
    return mapping


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    file: WeightFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class SafetensorsCheckpoint:
    """An open folder; see `Checkpoint` for the promises. `metadata` is config.json."""

    format = "safetensors"

    def __init__(self, path: Path, *, files: Sequence[WeightFile] | None = None) -> None:
        """`files` are those with tensors, if they are open already. Raises NotFound or
        CorruptWeights."""
        self.path = path
        self._readings = Readings()
        self.metadata: Mapping[str, Any] = read_json(path / "config.json")
        self._files: list[WeightFile] = list(files or ())
        self._tensors: dict[str, _Tensor] = {}
        try:
            for file in self._files:
                self._add(file, wanted=frozenset())
            for file_path, wanted in ({} if files else _weight_files(path)).items():
                self._files.append(MappedFile(file_path))
                self._add(self._files[-1], wanted=wanted or frozenset())
        except (CorruptWeights, NotFound):
            self.close()
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
        return self._tensors[name].shape

    def size_bytes(self, name: str) -> int:
        return self._tensors[name].size_bytes

    def place(self, name: str) -> Place:
        tensor = self._tensors[name]
        return Place(tensor.file.path, tensor.offset, tensor.size_bytes)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self._tensors[name]
        return self._read(name, 0, tensor.size_bytes, tensor.shape)

    def read_rows(self, name: str, *, first: int, count: int) -> npt.NDArray[np.float32]:
        tensor = self._tensors[name]
        row_bytes = tensor.size_bytes // tensor.shape[0]
        return self._read(name, first * row_bytes, count * row_bytes, (count, *tensor.shape[1:]))

    def _read(
        self, name: str, first_byte: int, num_bytes: int, shape: tuple[int, ...]
    ) -> npt.NDArray[np.float32]:
        tensor = self._tensors[name]
        offset = tensor.offset + first_byte
        raw = tensor.file.view(offset, num_bytes)
        values = _widen(raw, tensor.dtype, f"{tensor.file.path}: {name!r}").reshape(shape)
        self._readings.add(name, raw, first_byte=first_byte)
        del raw
        tensor.file.release(offset, num_bytes)
        require_finite(values, path=tensor.file.path, name=name)
        return values

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _add(self, file: WeightFile, *, wanted: frozenset[str]) -> None:
        """Adds one shard; `wanted` are the tensors the index promises in it."""
        tensors = _read_header(file)
        missing = sorted(wanted - tensors.keys())
        if missing:
            raise CorruptWeights(f"{file.path} lacks {missing[0]!r}, which the index promises")
        for name, tensor in tensors.items():
            if name in self._tensors:
                raise CorruptWeights(f"{file.path} repeats {name!r} of another shard")
            self._tensors[name] = tensor


def _widen(raw: npt.NDArray[np.uint8], dtype: str, what: str) -> npt.NDArray[np.float32]:
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    if dtype == "BF16":
        return bf16_to_f32(raw.view("<u2"))
    raise CorruptWeights(f"{what} is of type {dtype}; F32, F16 and BF16 are supported")


def _weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Finds the safetensors files of a folder, with the tensors that the index names in each."""
    if (folder / _INDEX_NAME).exists():
        return _indexed_files(folder)
    if (folder / _SINGLE_NAME).exists():
        return {folder / _SINGLE_NAME: None}
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise NotFound(f"{folder} has no safetensors file (pickled weights are not read)")
    return dict.fromkeys(found)


def _indexed_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    index = folder / _INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptWeights(f"{index} has no weight_map")
    names: dict[Path, set[str]] = {}
    for tensor, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_file_name(file_name):
            raise CorruptWeights(f"{index} names {file_name!r}, which is not a file of the folder")
        names.setdefault(folder / file_name, set()).add(tensor)
    return {path: frozenset(tensors) for path, tensors in sorted(names.items())}


def _is_file_name(name: str) -> bool:
    """Whether it stays in its folder, and a file can have it: without NUL and lone surrogates."""
    return Path(name).name == name and name.isprintable()


def _read_header(file: WeightFile) -> dict[str, _Tensor]:
    """Returns where every tensor lies."""
    if file.size_bytes < 8:
        raise CorruptWeights(f"{file.path} is too short for a safetensors header")
    length = int.from_bytes(file.data[:8], "little")
    if length > min(_MAX_HEADER_BYTES, file.size_bytes - 8):
        raise CorruptWeights(
            f"{file.path} claims a header of {length} bytes and has {file.size_bytes}; "
            "is it cut short?"
        )
    header = _parse_json(file.data[8 : 8 + length], file.path)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
    for before, after in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
        if before.offset + before.size_bytes > after.offset:
            raise CorruptWeights(f"{file.path} has overlapping tensors at byte {after.offset}")
    return tensors


def _tensor(file: WeightFile, data_offset: int, name: str, entry: Any) -> _Tensor:
    """Checks one entry of the header."""
    if not isinstance(entry, dict):
        raise CorruptWeights(f"{file.path}: the entry of {name!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise CorruptWeights(f"{file.path}: {name!r} has the unknown type {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CorruptWeights(f"{file.path}: {name!r} has a malformed shape or offsets")
    first, end = offsets
    if end - first != prod(shape) * _DTYPE_BYTES[dtype]:
        raise CorruptWeights(f"{file.path}: the bytes of {name!r} do not fit its shape {shape}")
    if data_offset + end > file.size_bytes:
        raise CorruptWeights(
            f"{file.path}: {name!r} reaches byte {data_offset + end}, but the file has "
            f"{file.size_bytes}; is it cut short?"
        )
    return _Tensor(
        file=file,
        dtype=dtype,
        shape=tuple(shape),
        offset=data_offset + first,
        size_bytes=end - first,
    )


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMENSIONS
        and all(
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
            for value in values
        )
    )
