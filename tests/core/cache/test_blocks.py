"""Blocks are handed out once, shared by key, and given back by each holder."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.cache.blocks import BlockAllocator
from core.errors import Exhausted

NUM_BLOCKS = 12


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences of blocks that are allocated, published, found, held and freed in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.holdings: list[list[int]] = []
        self.key_of: dict[int, bytes] = {}  # of each block that was published, until handed out

    @rule(count=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, count: int) -> None:
        held = {block for holding in self.holdings for block in holding}
        if count > NUM_BLOCKS - len(held):
            with pytest.raises(Exhausted):
                self.allocator.allocate(count)
            return
        unpublished = NUM_BLOCKS - len(held | self.key_of.keys())
        blocks = self.allocator.allocate(count)
        assert len(set(blocks)) == count
        assert not held & set(blocks)
        forgotten = [block for block in blocks if self.key_of.pop(block, None)]
        assert len(forgotten) == max(count - unpublished, 0)
        self.holdings.append(blocks)

    @precondition(lambda self: any(self.holdings))
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        holding = data.draw(st.sampled_from([one for one in self.holdings if one]))
        block = data.draw(st.sampled_from(holding))
        self.allocator.publish(block, key)
        if key not in self.key_of.values():
            self.key_of.setdefault(block, key)

    @rule(keys=st.lists(st.binary(min_size=1, max_size=1), max_size=3))
    def share(self, keys: list[bytes]) -> None:
        keys += sorted(self.key_of.values())
        found = self.allocator.find(keys)
        assert [self.key_of[block] for block in found] == keys[: len(found)]
        assert len(found) == len(keys) or keys[len(found)] not in self.key_of.values()
        held = {block for holding in self.holdings for block in holding}
        assert self.allocator.num_held(found) == sum(block in held for block in found)
        self.allocator.hold(found)
        self.holdings.append(found)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holdings) - 1))
        self.allocator.free(self.holdings.pop(index))

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        held = Counter(block for holding in self.holdings for block in holding)
        assert self.allocator.num_used == len(held)
        assert self.allocator.num_free == NUM_BLOCKS - len(held)
        for key in self.key_of.values():
            assert len(self.allocator.find([key])) == 1

    def teardown(self) -> None:
        for holding in self.holdings:
            self.allocator.free(holding)
        assert sorted(self.allocator.allocate(NUM_BLOCKS)) == list(range(NUM_BLOCKS))
        assert not any(self.allocator.find([key]) for key in self.key_of.values())


AllocatorMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestAllocator = AllocatorMachine.TestCase


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


def test_published_blocks_are_handed_out_last_and_in_the_order_given_back() -> None:
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(3)
    allocator.publish(blocks[0], b"a")
    allocator.publish(blocks[1], b"b")
    allocator.free([blocks[1], blocks[0], blocks[2]])
    assert [allocator.allocate(1)[0] for _ in range(3)] == [blocks[2], blocks[1], blocks[0]]


def test_a_block_that_was_found_again_counts_as_used_lately() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    for block, key in zip(blocks, (b"a", b"b"), strict=True):
        allocator.publish(block, key)
    allocator.free(blocks)
    found = allocator.find([b"a"])
    allocator.hold(found)
    allocator.free(found)
    allocator.allocate(1)
    assert allocator.find([b"a"]) == found
    assert allocator.find([b"b"]) == []
