"""A weight file cut into its prefix and one extent for each tensor, with no byte left over.

The prefix is all before the first tensor: names, shapes and offsets. An extent reaches from its
tensor to the next one, so that padding belongs to the tensor before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from core.errors import CorruptWeights
from core.weights.checkpoint import Checkpoint, Place

# Files beside the weights that say what the model is, and how its tokens are spelled.
_COMPANIONS = ("*.json", "*.jinja", "tokenizer.bin")


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes of a file that go by one tensor's name."""

    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class FileExtents:
    """Extents follow each other without a gap, from the end of the prefix to that of the file."""

    path: Path
    prefix_bytes: int
    extents: tuple[Extent, ...]

    @property
    def size_bytes(self) -> int:
        return self.prefix_bytes + sum(extent.size_bytes for extent in self.extents)

    def find(self, offset: int, num_bytes: int) -> int:
        """Index of the extent that has these bytes; raises CorruptWeights where none has all."""
        index = bisect_right(self._starts, offset) - 1
        extent = self.extents[index] if index >= 0 else None
        if extent is None or offset + num_bytes > extent.offset + extent.size_bytes:
            raise CorruptWeights(
                f"{self.path}: bytes {offset} to {offset + num_bytes} are not those of one tensor"
            )
        return index

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(extent.offset for extent in self.extents)


def follow(sizes: Iterable[tuple[str, int]], *, prefix_bytes: int) -> tuple[Extent, ...]:
    """Extents of these names and sizes, one after the other."""
    extents = []
    offset = prefix_bytes
    for name, size_bytes in sizes:
        extents.append(Extent(name=name, offset=offset, size_bytes=size_bytes))
        offset += size_bytes
    return tuple(extents)


def file_extents(checkpoint: Checkpoint) -> tuple[FileExtents, ...]:
    """All files of a checkpoint that have tensors, by name."""
    places: dict[Path, dict[str, Place]] = {}
    for name in checkpoint.tensor_names:
        place = checkpoint.place(name)
        places.setdefault(place.path, {})[name] = place
    return tuple(_cut(path, places[path]) for path in sorted(places))


def companions(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files beside the weights without which they are no model."""
    if checkpoint.format == "gguf":  # which has it all inside
        return ()
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    patterns = _COMPANIONS[:2] if checkpoint.path.is_dir() else _COMPANIONS[2:]
    return tuple(sorted(path for pattern in patterns for path in folder.glob(pattern)))


def _cut(path: Path, places: Mapping[str, Place]) -> FileExtents:
    in_order = sorted(places, key=lambda name: (places[name].offset, places[name].size_bytes))
    edges = [places[name].offset for name in in_order] + [path.stat().st_size]
    sizes = [end - start for start, end in pairwise(edges)]
    extents = follow(zip(in_order, sizes, strict=True), prefix_bytes=edges[0])
    return FileExtents(path=path, prefix_bytes=edges[0], extents=extents)
