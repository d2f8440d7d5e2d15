"""The slots and KV blocks of one path, and what its stages have yet to be told of them.

Stages perform orders first in, first out. A block or slot that is given back here may
therefore be handed out again at once: the message that announces the end travels behind
every micro-batch that still writes to it, and before or with the one that uses it anew.
Slots nevertheless rest until nothing in flight names them, so that a slot in a late message
means one sequence only.
"""

from __future__ import annotations

from collections import deque

from core.cache.blocks import BlockAllocator
from core.pipeline.batch import SequenceStart, SequenceUpdates
from core.pipeline.events import PipelineFacts
from core.pipeline.sequences import Sequence

_NOTHING = SequenceUpdates()


class PathMirror:
    """One allocator and one block table per stage; every sequence has a block on all or none."""

    def __init__(self, facts: PipelineFacts) -> None:
        self.allocators = [BlockAllocator(stage.num_kv_blocks) for stage in facts.stages]
        self._block_size = facts.kv_block_size
        self._free_slots = list(range(facts.num_slots - 1, -1, -1))
        self._resting_slots: deque[tuple[int, int]] = deque()
        self._forget()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that the scarcest stage has left."""
        return min(allocator.num_free for allocator in self.allocators)

    @property
    def free_share(self) -> float:
        """Share of the blocks that is free on the scarcest stage."""
        return min(a.num_free / a.num_blocks for a in self.allocators)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def has_updates(self) -> bool:
        return bool(self._ended_slots or self._starts or self._block_slots)

    def blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self._block_size)

    def start(self, sequence: Sequence) -> None:
        """Gives it a slot and blocks for all tokens so far; the caller knows they are free."""
        sequence.slot = self._free_slots.pop()
        sequence.tables_S = [[] for _ in self.allocators]
        sequence.capacity = 0
        sequence.num_scheduled = 0
        self._starts.append(sequence)
        self.grow(sequence, self.blocks_for(len(sequence.token_ids)))

    def grow(self, sequence: Sequence, count: int) -> None:
        """Adds blocks to a sequence on every stage."""
        stages = zip(self.allocators, sequence.tables_S, self._block_ids_S, strict=True)
        for allocator, table, pending in stages:
            blocks = allocator.allocate(count)
            table += blocks
            pending += blocks
        self._block_slots += [sequence.slot] * count
        sequence.capacity += count * self._block_size

    def end(self, sequence: Sequence, *, returned_id: int) -> None:
        """Takes slot and blocks back. `returned_id`: the latest micro-batch that has returned."""
        for allocator, table in zip(self.allocators, sequence.tables_S, strict=True):
            allocator.free(table)
        self._ended_slots.append(sequence.slot)
        if sequence.last_micro_batch_id > returned_id:
            self._resting_slots.append((sequence.last_micro_batch_id, sequence.slot))
        else:
            self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.tables_S = []
        sequence.capacity = 0

    def release_slots(self, returned_id: int) -> None:
        """Lets slots be used again whose micro-batches up to `returned_id` have returned."""
        resting = self._resting_slots
        for _ in range(len(resting)):
            last_id, slot = resting.popleft()
            if last_id <= returned_id:
                self._free_slots.append(slot)
            else:
                resting.append((last_id, slot))

    def take_updates(self) -> list[SequenceUpdates]:
        """What each stage must hear now; the last stage's starts say how to sample."""
        if not self.has_updates:
            return [_NOTHING] * len(self.allocators)
        ended, slots = tuple(self._ended_slots), tuple(self._block_slots)
        starts = tuple(_start(sequence, samples=False) for sequence in self._starts)
        last_starts = tuple(_start(sequence, samples=True) for sequence in self._starts)
        last = len(self.allocators) - 1
        updates_S = [
            SequenceUpdates(
                ended_slots=ended,
                starts=last_starts if stage == last else starts,
                block_slots=slots,
                block_ids=tuple(block_ids),
            )
            for stage, block_ids in enumerate(self._block_ids_S)
        ]
        self._forget()
        return updates_S

    def _forget(self) -> None:
        self._ended_slots: list[int] = []
        self._starts: list[Sequence] = []
        self._block_slots: list[int] = []
        self._block_ids_S: list[list[int]] = [[] for _ in self.allocators]


def _start(sequence: Sequence, *, samples: bool) -> SequenceStart:
    if not samples:
        return SequenceStart(
            slot=sequence.slot, request_id=sequence.request_id, traceparent=sequence.traceparent
        )
    knows = sequence.sampling.has_penalties
    return SequenceStart(
        slot=sequence.slot,
        request_id=sequence.request_id,
        sampling=sequence.sampling,
        known_token_ids=tuple(sequence.token_ids) if knows else (),
        num_prompt_tokens=sequence.num_prompt_tokens if knows else 0,
        traceparent=sequence.traceparent,
    )
