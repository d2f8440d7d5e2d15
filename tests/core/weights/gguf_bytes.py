"""GGUF headers written byte by byte, right or wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
TYPE_F32, TYPE_Q4_0 = 0, 2


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key_value(key: str, value_type: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", value_type) + value


def u32(key: str, value: int) -> bytes:
    return key_value(key, U32, struct.pack("<I", value))


def array(key: str, item_type: int, count: int, items: bytes) -> bytes:
    return key_value(key, ARRAY, struct.pack("<IQ", item_type, count) + items)


def tensor(
    name: str | bytes, dimensions: list[int], *, block_type: int = TYPE_F32, offset: int = 0
) -> bytes:
    """Dimensions in the file's order: fastest varying first."""
    head = string(name) + struct.pack("<I", len(dimensions))
    return head + struct.pack(f"<{len(dimensions)}QIQ", *dimensions, block_type, offset)


KEY_VALUES = [
    key_value("general.architecture", STRING, string("llama")),
    array("words", STRING, 3, string("a") + string("") + string("Grüße")),
    array("numbers", U32, 2, struct.pack("<2I", 7, 8)),
    array("switches", BOOL, 2, b"\x01\x00"),
    key_value("scale", F32, struct.pack("<f", 0.5)),
    key_value("flag", BOOL, b"\x01"),
]
TENSORS = [tensor("matrix", [8, 2]), tensor("vector", [4], offset=64)]


@dataclass
class GgufBytes:
    """A small valid file, unless fields are replaced. Counts follow the lists unless given."""

    magic: bytes = b"GGUF"
    version: int = 3
    key_values: list[bytes] = field(default_factory=lambda: list(KEY_VALUES))
    tensors: list[bytes] = field(default_factory=lambda: list(TENSORS))
    num_key_values: int | None = None
    num_tensors: int | None = None
    alignment: int = 32
    data: bytes = struct.pack("<20f", *range(20))

    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_values = len(self.key_values) if self.num_key_values is None else self.num_key_values
        counts = struct.pack("<IQQ", self.version, num_tensors, num_values)
        return self.magic + counts + b"".join(self.key_values) + b"".join(self.tensors)

    def to_bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path
