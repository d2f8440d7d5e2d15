"""Blocks are handed out once, and given back once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.cache.blocks import BlockAllocator
from core.errors import Exhausted


@given(st.lists(st.integers(-5, 5), max_size=40))
def test_no_block_is_held_twice_and_all_come_back(counts: list[int]) -> None:
    """Positive numbers allocate so many blocks, others free the oldest holding."""
    allocator = BlockAllocator(20)
    holdings: list[list[int]] = []
    for count in counts:
        if count > 0 and count <= allocator.num_free:
            holdings.append(allocator.allocate(count))
        elif count <= 0 and holdings:
            allocator.free(holdings.pop(0))
        held = [block for holding in holdings for block in holding]
        assert len(set(held)) == len(held) == allocator.num_used
        assert allocator.num_free == 20 - len(held)
    for holding in holdings:
        allocator.free(holding)
    assert sorted(allocator.allocate(20)) == list(range(20))


def test_too_many_blocks_are_refused_and_none_is_taken() -> None:
    allocator = BlockAllocator(3)
    with pytest.raises(Exhausted, match="4 KV blocks wanted, 3 free"):
        allocator.allocate(4)
    assert allocator.num_free == 3


def test_freeing_twice_is_a_bug() -> None:
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(AssertionError):
        allocator.free(blocks)
