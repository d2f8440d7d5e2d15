"""Hands out the KV blocks of one stage replica, and finds those whose content is known."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from core.errors import Exhausted


class BlockAllocator:
    """The block ids 0 .. num_blocks - 1, each with the number of its holders.

    A full block can be published under a key that stands for its content (`prefix.py`);
    whoever finds it may hold it too. When nobody does any more it counts as free, but is
    handed out only after all blocks without a key, the one given back longest ago first.
    Of those without a key, the latest freed goes first: it is the likeliest to be in a cache.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()  # published, held by nobody
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; raises Exhausted, and takes none, when fewer are free."""
        if count > self.num_free:
            raise Exhausted(f"{count} KV blocks wanted, {self.num_free} free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back, the first to be forgotten first; freeing a free one is our bug."""
        for block in blocks:
            assert self._num_holders[block] > 0, f"block {block} is freed twice"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, key: bytes) -> bool:
        """Lets a held block be found; False, and nothing has changed, where it has a key or another
        one has that key already."""
        assert self._num_holders[block] > 0, f"block {block} is published by nobody"
        if key in self._block_of or block in self._key_of:
            return False
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def unpublish(self, block: int) -> None:
        """Takes a promise back: nobody finds the block any more. Its holders keep it."""
        key = self._key_of.pop(block, None)
        if key is None:
            return
        del self._block_of[key]
        if block in self._kept:
            del self._kept[block]
            self._free.append(block)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of as many `keys` as are known, up to the first that is not."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have a holder, so that another one costs no free block."""
        return sum(self._num_holders[block] > 0 for block in blocks)

    def num_holders(self, blocks: Iterable[int]) -> list[int]:
        """How many hold each of `blocks`."""
        return [self._num_holders[block] for block in blocks]

    def hold(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that were found."""
        for block in blocks:
            self._kept.pop(block, None)
            self._num_holders[block] += 1

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
