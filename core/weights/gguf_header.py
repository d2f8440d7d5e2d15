"""The header of a GGUF file (versions 2 and 3, little-endian), validated in full.

Format: `docs/gguf.md` of ggml. Why not the `gguf` library's reader: it makes several
numpy objects for every string of the vocabulary, which takes 2 to 8 seconds; here arrays
are stepped over and parsed only when somebody asks for them.

Nothing in the file is believed: counts and lengths are compared with the bytes that are
left before anything of that size is made.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from core.errors import CorruptWeights
from core.weights.dequantise import block_layout
from core.weights.mapped_file import WeightFile

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_NAME_BYTES = 1024
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_ARRAY_DTYPES = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",  # bool: one byte, 0 or 1
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
# The fewest bytes that a key-value and a tensor entry can take: bounds for their counts.
_MIN_KEY_VALUE_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies: `shape` in C order, `offset` from the start of the file."""

    name: str
    block_type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class _Array:
    """An array in the header that has not been parsed: the bytes of its items, and their type."""

    item_type: int
    count: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """`size_bytes` is the length of the header: up to the first tensor's padding."""

    version: int
    metadata: GgufMetadata
    tensors: dict[str, GgufTensor]
    size_bytes: int


class GgufMetadata(Mapping[str, Any]):
    """The key-values: numbers, booleans, strings; arrays become a list of strings or a numpy
    array, parsed when first asked for (the file must still be open then)."""

    def __init__(self, cursor: _Cursor, values: dict[str, Any]) -> None:
        self._cursor = cursor
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = self._cursor.parse_array(value, key=key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Cursor:
    """Reads forward through the header and refuses to read past the end of the file."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._data = file.data
        self._end = file.size_bytes
        self.position = 0

    def error(self, message: str) -> CorruptWeights:
        return CorruptWeights(f"{self._file.path} is not a valid GGUF file: {message}")

    def require(self, num_bytes: int, what: str) -> int:
        """Returns the position of the next `num_bytes` and steps over them."""
        position = self.position
        if num_bytes > self._end - position:
            raise self.error(
                f"it ends inside {what} ({num_bytes} bytes wanted at {position}, "
                f"{self._end - position} left)"
            )
        self.position = position + num_bytes
        return position

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._data, self.require(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._data, self.require(8, what))[0])

    def string(self, what: str) -> str:
        size = self.u64(f"the length of {what}")
        first = self.require(size, what)
        return self._decode(first, size, what)

    def value(self, key: str) -> Any:
        """Reads one typed value; of an array only where it lies."""
        value_type = self.u32(f"the type of {key!r}")
        if value_type == _STRING:
            return self.string(f"the value of {key!r}")
        if value_type == _ARRAY:
            return self._step_over_array(key)
        return self._scalar(value_type, key)

    def parse_array(self, array: _Array, *, key: str) -> Any:
        if array.item_type == _STRING:
            return self._parse_strings(array, key)
        dtype = np.dtype(_ARRAY_DTYPES[array.item_type])
        items = np.frombuffer(self._data, dtype, array.count, array.offset)
        return items.astype(np.bool_) if array.item_type == 7 else items.copy()

    def _scalar(self, value_type: int, key: str) -> Any:
        layout = _SCALARS.get(value_type)
        if layout is None:
            raise self.error(f"{key!r} has the unknown type {value_type}")
        first = self.require(layout.size, f"the value of {key!r}")
        return layout.unpack_from(self._data, first)[0]

    def _step_over_array(self, key: str) -> _Array:
        item_type = self.u32(f"the item type of {key!r}")
        count = self.u64(f"the length of {key!r}")
        if item_type == _STRING:
            return self._step_over_strings(count, key)
        dtype = _ARRAY_DTYPES.get(item_type)
        if dtype is None:
            raise self.error(f"{key!r} is an array of the unsupported type {item_type}")
        first = self.require(count * np.dtype(dtype).itemsize, f"the array {key!r}")
        return _Array(item_type, count, first)

    def _step_over_strings(self, count: int, key: str) -> _Array:
        if count > (self._end - self.position) // 8:
            raise self.error(
                f"the array {key!r} claims {count} strings, more than the file can hold"
            )
        array = _Array(_STRING, count, self.position)
        # A plain loop over local names: it runs once per token of the vocabulary.
        data, end, position, unpack = self._data, self._end, self.position, _U64.unpack_from
        for _ in range(count):
            if position + 8 > end:
                raise self.error(f"it ends inside the array {key!r}")
            position += 8 + unpack(data, position)[0]
        if position > end:
            raise self.error(f"a string of the array {key!r} is longer than the file")
        self.position = position
        return array

    def _parse_strings(self, array: _Array, key: str) -> list[str]:
        position, strings = array.offset, []
        for _ in range(array.count):
            size = _U64.unpack_from(self._data, position)[0]
            strings.append(self._decode(position + 8, size, f"an item of {key!r}"))
            position += 8 + size
        return strings

    def _decode(self, first: int, size: int, what: str) -> str:
        try:
            return self._data[first : first + size].decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None


def read_header(file: WeightFile) -> GgufHeader:
    """Parses and checks the header; raises CorruptWeights with the first thing that is wrong."""
    cursor = _Cursor(file)
    version = _read_version(cursor, file)
    num_tensors = cursor.u64("the number of tensors")
    num_key_values = cursor.u64("the number of key-values")
    left = file.size_bytes - cursor.position
    for count, smallest, what in (
        (num_tensors, _MIN_TENSOR_BYTES, "tensors"),
        (num_key_values, _MIN_KEY_VALUE_BYTES, "key-values"),
    ):
        if count > left // smallest:
            raise cursor.error(f"it claims {count} {what}, more than its {left} bytes can hold")
    metadata = _read_metadata(cursor, num_key_values)
    alignment = _alignment(cursor, metadata)
    entries = [_read_tensor(cursor) for _ in range(num_tensors)]
    header_bytes = cursor.position
    data_offset = -(-header_bytes // alignment) * alignment
    tensors = _place(cursor, entries, data_offset, alignment, file.size_bytes)
    return GgufHeader(version, metadata, tensors, header_bytes)


def _read_version(cursor: _Cursor, file: WeightFile) -> int:
    first = cursor.require(4, "the magic number")
    if file.data[first : first + 4] != MAGIC:
        raise cursor.error("it does not begin with 'GGUF'")
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0 and version:
            raise cursor.error("it is big-endian, which is not supported")
        raise cursor.error(f"its version is {version}; 2 and 3 are supported")
    return version


def _read_metadata(cursor: _Cursor, count: int) -> GgufMetadata:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a key")
        if key in values:
            raise cursor.error(f"the key {key!r} occurs twice")
        values[key] = cursor.value(key)
    return GgufMetadata(cursor, values)


def _alignment(cursor: _Cursor, metadata: GgufMetadata) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or not 0 < alignment <= _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise cursor.error(
            f"the alignment {alignment!r} is not a power of two up to {_MAX_ALIGNMENT}"
        )
    return alignment


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """Reads one tensor entry; its offset is still relative to the data section."""
    name = cursor.string("a tensor's name")
    if not name or len(name) > _MAX_NAME_BYTES:
        raise cursor.error(
            f"a tensor's name has {len(name)} characters; 1 to {_MAX_NAME_BYTES} allowed"
        )
    num_dimensions = cursor.u32(f"the dimensions of {name!r}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.error(
            f"{name!r} has {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} allowed"
        )
    # The file has the fastest varying dimension first.
    shape = tuple(cursor.u64(f"the shape of {name!r}") for _ in range(num_dimensions))[::-1]
    block_type = _block_type(cursor, name)
    num_values, block_bytes = block_layout(block_type)
    if 0 in shape or shape[-1] % num_values:
        raise cursor.error(
            f"{name!r} of shape {shape} does not consist of {block_type.name} blocks"
        )
    return GgufTensor(
        name=name,
        block_type=block_type,
        shape=shape,
        offset=cursor.u64(f"the offset of {name!r}"),
        size_bytes=prod(shape) // num_values * block_bytes,
    )


def _block_type(cursor: _Cursor, name: str) -> GGMLQuantizationType:
    number = cursor.u32(f"the type of {name!r}")
    try:
        block_type = GGMLQuantizationType(number)
        block_layout(block_type)
    except (ValueError, KeyError):
        raise cursor.error(f"{name!r} has the unknown type {number}") from None
    return block_type


def _place(
    cursor: _Cursor, entries: list[GgufTensor], data_offset: int, alignment: int, file_bytes: int
) -> dict[str, GgufTensor]:
    """Makes offsets absolute; checks bounds, alignment, overlaps and names."""
    tensors: dict[str, GgufTensor] = {}
    for entry in entries:
        if entry.name in tensors:
            raise cursor.error(f"the tensor {entry.name!r} occurs twice")
        if entry.offset % alignment:
            raise cursor.error(f"{entry.name!r} is not aligned to {alignment} bytes")
        offset = data_offset + entry.offset
        if offset + entry.size_bytes > file_bytes:
            raise cursor.error(
                f"{entry.name!r} reaches byte {offset + entry.size_bytes}, but the file has "
                f"{file_bytes}; is it cut short?"
            )
        tensors[entry.name] = GgufTensor(
            name=entry.name,
            block_type=entry.block_type,
            shape=entry.shape,
            offset=offset,
            size_bytes=entry.size_bytes,
        )
    for before, after in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
        if before.offset + before.size_bytes > after.offset:
            raise cursor.error(f"{before.name!r} and {after.name!r} overlap")
    return tensors
