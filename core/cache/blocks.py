"""Hands out the KV blocks of one stage replica."""

from __future__ import annotations

from collections.abc import Iterable

from core.errors import Exhausted


class BlockAllocator:
    """A free list of the block ids 0 .. num_blocks - 1.

    Lately freed blocks are handed out first: their memory is the likeliest to be in a cache.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; raises Exhausted, and takes none, when fewer are free."""
        if count > len(self._free):
            raise Exhausted(f"{count} KV blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_used[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back; freeing one that is free is our own bug."""
        for block in blocks:
            assert self._is_used[block], f"block {block} is freed twice"
            self._is_used[block] = 0
            self._free.append(block)
