"""The slots and KV blocks of one path, and what its stages have yet to be told of them.

Stages perform orders first in, first out. A block or slot that is given back here may
therefore be handed out again at once: the message that announces the end travels behind
every micro-batch that still writes to it, and before or with the one that uses it anew.
Slots nevertheless rest until nothing in flight names them, so that a slot in a late message
means one sequence only.

For the same reason a full block can be shared from the moment that the run which fills it
has been put into a micro-batch, long before it is computed. Whoever finds it is put into that
micro-batch or a later one; every stage performs them in order, and within one it writes the
keys and values of all rows before any row reads them. That the first sequence is cancelled or
preempted meanwhile changes nothing: what has been launched is computed to its end. Nor can
the content be lost: a block that nobody holds keeps its key until it is handed out again, its
next owner writes it in a later micro-batch than its last reader read it, and full blocks
are never written by those who hold them: a sequence goes on behind the blocks that it found.
"""

from __future__ import annotations

from collections import deque

from core.cache.blocks import BlockAllocator
from core.cache.prefix import extend_keys, root_key
from core.pipeline.batch import SequenceStart, SequenceUpdates
from core.pipeline.events import PipelineFacts
from core.pipeline.sequences import Sequence

_NOTHING = SequenceUpdates()


class PathMirror:
    """One allocator and one block table per stage; every sequence has a block on all or none.

    A prefix is found as far as every stage still has its blocks.
    """

    def __init__(self, facts: PipelineFacts, *, shares_prefixes: bool) -> None:
        self.allocators = [BlockAllocator(stage.num_kv_blocks) for stage in facts.stages]
        self._block_size = facts.kv_block_size
        self._weights = facts.weights
        self._shares_prefixes = shares_prefixes
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
    def has_updates(self) -> bool:
        return bool(self._ended_slots or self._starts or self._block_slots)

    def start(self, sequence: Sequence, *, spare: int) -> bool:
        """Gives it a slot, blocks that others have computed, and free ones for its other tokens.

        False, and nothing has changed, without a free slot or when not even `spare` blocks
        would be left. At least one token remains to be computed: the next one is sampled there.
        """
        if not self._free_slots:
            return False
        wanted = -(-len(sequence.token_ids) // self._block_size)
        found_S = self._find(sequence)
        if not self._are_free(wanted + spare, found_S):
            return False
        num_found = len(found_S[0])
        sequence.slot = self._free_slots.pop()
        sequence.tables_S = found_S
        for allocator, found, pending in zip(
            self.allocators, found_S, self._block_ids_S, strict=True
        ):
            allocator.hold(found)
            pending += found
        self._block_slots += [sequence.slot] * num_found
        sequence.num_published = num_found
        sequence.capacity = num_found * self._block_size
        sequence.num_scheduled = sequence.num_found = sequence.capacity
        self._starts.append(sequence)
        self.grow(sequence, wanted - num_found)
        return True

    def grow(self, sequence: Sequence, count: int) -> None:
        """Adds blocks to a sequence on every stage."""
        stages = zip(self.allocators, sequence.tables_S, self._block_ids_S, strict=True)
        for allocator, table, pending in stages:
            blocks = allocator.allocate(count)
            table += blocks
            pending += blocks
        self._block_slots += [sequence.slot] * count
        sequence.capacity += count * self._block_size

    def publish(self, sequence: Sequence, *, num_positions: int) -> None:
        """Lets others find the full blocks of its first `num_positions`, which are launched next
        or have been launched, with the tokens that it has now."""
        if not self._shares_prefixes:
            return
        keys = self._keys(sequence)
        first, end = sequence.num_published, num_positions // self._block_size
        for allocator, table in zip(self.allocators, sequence.tables_S, strict=True):
            for index in range(first, end):
                allocator.publish(table[index], keys[index])
        sequence.num_published = max(first, end)

    def end(self, sequence: Sequence, *, returned_id: int) -> None:
        """Takes slot and blocks back. `returned_id`: the latest micro-batch that has returned.

        What it generated can be found from now on, as the beginning of a conversation's next
        prompt: published here rather than block by block, so that tokens cost nothing.
        """
        num_launched = min(sequence.num_scheduled, len(sequence.token_ids))
        self.publish(sequence, num_positions=num_launched)
        for allocator, table in zip(self.allocators, sequence.tables_S, strict=True):
            # A block is of no use without those before it: the last are forgotten first.
            allocator.free(reversed(table))
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

    def _keys(self, sequence: Sequence) -> list[bytes]:
        root = root_key(weights=self._weights, salt=sequence.cache_salt)
        extend_keys(sequence.block_keys, sequence.token_ids, root=root, block_size=self._block_size)
        return sequence.block_keys

    def _find(self, sequence: Sequence) -> list[list[int]]:
        """Stage by stage, the blocks of what all stages have of its beginning."""
        if not self._shares_prefixes:
            return [[] for _ in self.allocators]
        keys = self._keys(sequence)[: (len(sequence.token_ids) - 1) // self._block_size]
        found_S = []
        for allocator in self.allocators:
            found_S.append(allocator.find(keys))
            keys = keys[: len(found_S[-1])]
        return [found[: len(keys)] for found in found_S]

    def _are_free(self, count: int, found_S: list[list[int]]) -> bool:
        """Whether each stage has `count` blocks that are free, or found and held already."""
        return all(
            count - allocator.num_held(found) <= allocator.num_free
            for allocator, found in zip(self.allocators, found_S, strict=True)
        )

    def _forget(self) -> None:
        self._ended_slots: list[int] = []
        self._starts: list[Sequence] = []
        self._block_slots: list[int] = []
        self._block_ids_S: list[list[int]] = [[] for _ in self.allocators]


def _start(sequence: Sequence, *, samples: bool) -> SequenceStart:
    if not samples:
        return SequenceStart(
            slot=sequence.slot,
            request_id=sequence.request_id,
            num_cached_positions=sequence.num_found,
            traceparent=sequence.traceparent,
        )
    knows = sequence.sampling.has_penalties
    return SequenceStart(
        slot=sequence.slot,
        request_id=sequence.request_id,
        num_cached_positions=sequence.num_found,
        sampling=sequence.sampling,
        known_token_ids=tuple(sequence.token_ids) if knows else (),
        num_prompt_tokens=sequence.num_prompt_tokens if knows else 0,
        traceparent=sequence.traceparent,
    )
