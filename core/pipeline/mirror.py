"""The slots and KV blocks of sequences on the replicas that hold them.

Replicas perform orders first in, first out. A block or slot that is given back here may
therefore be handed out again at once: the message that announces the end travels behind
every micro-batch that still writes to it, and before or with the one that uses it anew.

For the same reason a full block can be shared from the moment that the run which fills it
has been put into a micro-batch, long before it is computed. Whoever finds it is put into that
micro-batch or a later one; every replica performs them in order, and within one it writes the
keys and values of all rows before any row reads them. That the first sequence is cancelled or
preempted meanwhile changes nothing: what has been launched is computed to its end, unless it is
lost (`failover.py` then takes back what was promised). Nor can the content be lost: a block
that nobody holds keeps its key until it is handed out again, its next owner writes it in a
later micro-batch than its last reader read it, and full blocks are never written by those who
found them: a sequence goes on behind the blocks that it found. One that was rewound writes its
own blocks again, with the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as List

from core.cache.prefix import extend_keys, root_key
from core.pipeline.batch import SequenceStart
from core.pipeline.cut import Cut
from core.pipeline.flights import Promise, Traffic
from core.pipeline.replica import Replica
from core.pipeline.restore_plan import plan_restore
from core.pipeline.sequences import Piece, Seat, Sequence
from core.pipeline.slots import SlotPool


class Mirror:
    """One block table per sequence and replica: its seat there.

    All seats of a running sequence have as many blocks. A prefix is found as far as every replica
    of the path still has its blocks.
    """

    def __init__(
        self, *, num_slots: int, block_size: int, shares_prefixes: bool, traffic: Traffic
    ) -> None:
        self._slots = SlotPool(num_slots, traffic)
        self._block_size = block_size
        self._shares_prefixes = shares_prefixes

    def start(
        self,
        sequence: Sequence,
        replicas: List[Replica],
        *,
        cut: Cut,
        spare: int,
    ) -> bool:
        """Gives it a slot, blocks that others have computed, and free ones for its other tokens.

        False, and nothing has changed, without a free slot or when not even `spare` blocks
        would be left. At least one token remains to be computed: the next one is sampled there.
        """
        wanted = -(-len(sequence.token_ids) // self._block_size)
        found_S = self._find(sequence, replicas, cut)
        if not _are_free(wanted + spare, replicas, found_S):
            return False
        slot = self._slots.take()
        if slot is None:
            return False
        sequence.slot = slot
        sequence.cut = cut
        num_found = len(found_S[0])
        sequence.num_published = num_found
        sequence.num_scheduled = sequence.capacity = num_found * self._block_size
        sequence.seats = [
            self._seat(sequence, replica, found, samples=replica is replicas[-1])
            for replica, found in zip(replicas, found_S, strict=True)
        ]
        sequence.latest_seats = sequence.seats
        self.grow(sequence, wanted - num_found)
        return True

    def num_findable(self, sequence: Sequence, replicas: List[Replica], cut: Cut) -> int:
        """Positions that it would find if it started there."""
        return len(self._find(sequence, replicas, cut)[0]) * self._block_size

    def grow(self, sequence: Sequence, count: int) -> None:
        """Adds blocks to a sequence on every replica."""
        slot = sequence.slot
        for seat in sequence.seats:
            seat.replica.grow(slot, seat, count)
        sequence.capacity += count * self._block_size

    def publish(self, sequence: Sequence, *, num_positions: int) -> Promise | None:
        """Lets others find the full blocks of its first `num_positions`, which are launched next
        or have been launched, with the tokens that it has now. Returns those that are new."""
        first, end = sequence.num_published, num_positions // self._block_size
        if not self._shares_prefixes or end <= first:
            return None
        sequence.num_published = end
        return self._promise(sequence, sequence.seats, range(first, end))

    def _promise(
        self, sequence: Sequence, seats: list[Seat], blocks: range, *, num_senders: int = 0
    ) -> Promise:
        """Publishes blocks of some seats; the first `num_senders` have them already."""
        assert sequence.cut is not None
        keys = self._keys(sequence, sequence.cut)
        block_ids_S: list[list[int]] = [[]] * num_senders
        for seat in seats[num_senders:]:
            publish, block_ids = seat.replica.allocator.publish, seat.block_ids
            block_ids_S.append([block_ids[n] for n in blocks if publish(block_ids[n], keys[n])])
        return Promise(seats, block_ids_S)

    def publish_restored(self, sequence: Sequence, piece: Piece) -> Promise | None:
        """Lets others find the full blocks that a piece fills, on the stages that it restores."""
        size = self._block_size
        first, end = piece.first // size, piece.end // size
        if not self._shares_prefixes or end <= first:
            return None
        # The sender's log may hold what was promised too.
        seats = sequence.seats[max(piece.first_stage - 1, 0) : piece.end_stage]
        num_senders = len(seats) - (piece.end_stage - piece.first_stage)
        return self._promise(sequence, seats, range(first, end), num_senders=num_senders)

    def end(self, sequence: Sequence, *, publishes: bool = True) -> None:
        """Takes slot and blocks back.

        What it generated can be found from now on, as the beginning of a conversation's next
        prompt: published here rather than block by block, so that tokens cost nothing. Only what
        has landed: of prompts, what has been launched is published already.
        """
        seats = sequence.seats
        if publishes and all(seat.is_whole for seat in seats) and seats:
            num_landed = min(sequence.num_scheduled, len(sequence.token_ids) - 1)
            self.publish(sequence, num_positions=num_landed)
        for seat in seats:
            _leave(sequence, seat)
        self._slots.give_back(sequence)
        sequence.seats = []
        sequence.capacity = 0
        sequence.pieces.clear()

    def lose(self, sequence: Sequence, replica: Replica) -> None:
        """Forgets what it had on a replica that is gone."""
        sequence.seats = [seat for seat in sequence.seats if seat.replica is not replica]

    def move(self, sequence: Sequence, replicas: List[Replica], *, cut: Cut) -> bool:
        """Gives a sequence of which nothing is in flight another path, or the same one again.

        On replicas that stay it goes back to what has landed, `num_scheduled`; what those that are
        new to it lack is planned as `pieces`. False, and nothing has changed, without room.
        """
        old = {seat.replica: seat for seat in sequence.seats}
        found_of = self._find_alone(sequence, [r for r in replicas if r not in old])
        num_blocks = sequence.capacity // self._block_size
        for replica, found in found_of.items():
            if not _are_free(num_blocks, [replica], [found]):
                return False
        for replica, seat in old.items():
            if replica not in replicas:
                _leave(sequence, seat)
        landed = sequence.num_scheduled
        sequence.cut = cut
        sequence.seats = [
            self._keep(sequence, old[replica], landed)
            if replica in old
            else self._take(
                self._seat(sequence, replica, found_of[replica], samples=replica is replicas[-1]),
                sequence,
                landed,
            )
            for replica in replicas
        ]
        sequence.latest_seats = sequence.seats
        held_S = [seat.num_restored for seat in sequence.seats]
        sequence.pieces = deque(plan_restore(held_S, landed))
        sequence.num_published = min(sequence.num_published, landed // self._block_size)
        return True

    def _keep(self, sequence: Sequence, seat: Seat, landed: int) -> Seat:
        """Goes back to what has landed. The seat is made anew: what is still in flight to restore
        the old one no longer counts."""
        held = landed if seat.is_whole else seat.num_restored
        seat.replica.rewind(sequence.slot, held)
        return Seat(seat.replica, seat.block_ids, seat.num_found, held, landed)

    def _take(self, seat: Seat, sequence: Sequence, landed: int) -> Seat:
        num_lacking = sequence.capacity // self._block_size - len(seat.block_ids)
        seat.replica.grow(sequence.slot, seat, num_lacking)
        seat.num_restored, seat.restore_end = seat.num_found, landed
        return seat

    def _seat(
        self, sequence: Sequence, replica: Replica, found: list[int], *, samples: bool
    ) -> Seat:
        """Lets a sequence begin on a replica, with blocks that it found there."""
        seat = Seat(replica, found, len(found) * self._block_size)
        replica.allocator.hold(found)
        replica.residents.add(sequence)
        replica.start(_start(sequence, num_cached=seat.num_found, samples=samples), seat)
        return seat

    def _keys(self, sequence: Sequence, cut: Cut) -> list[bytes]:
        root = root_key(weights=cut.weights, salt=sequence.cache_salt)
        if root != sequence.root_key:
            sequence.root_key, sequence.block_keys = root, []
        extend_keys(sequence.block_keys, sequence.token_ids, root=root, block_size=self._block_size)
        return sequence.block_keys

    def _find(self, sequence: Sequence, replicas: List[Replica], cut: Cut) -> list[list[int]]:
        """Replica by replica, the blocks of what all have of its beginning."""
        if not self._shares_prefixes:
            return [[] for _ in replicas]
        keys = self._keys(sequence, cut)[: (len(sequence.token_ids) - 1) // self._block_size]
        found_S = []
        for replica in replicas:
            found_S.append(replica.allocator.find(keys))
            keys = keys[: len(found_S[-1])]
        return [found[: len(keys)] for found in found_S]

    def _find_alone(self, sequence: Sequence, replicas: List[Replica]) -> dict[Replica, list[int]]:
        """Of each replica for itself, the blocks of what it has of all that has landed."""
        if not self._shares_prefixes or not replicas:
            return {replica: [] for replica in replicas}
        assert sequence.cut is not None
        keys = self._keys(sequence, sequence.cut)
        keys = keys[: sequence.num_scheduled // self._block_size]
        return {replica: replica.allocator.find(keys) for replica in replicas}


def _are_free(count: int, replicas: List[Replica], found_S: list[list[int]]) -> bool:
    """Whether each replica has `count` blocks that are free, or found and held already."""
    return all(
        count - replica.allocator.num_held(found) <= replica.allocator.num_free
        for replica, found in zip(replicas, found_S, strict=True)
    )


def _leave(sequence: Sequence, seat: Seat) -> None:
    # A block is of no use without those before it: the last are forgotten first.
    seat.replica.allocator.free(reversed(seat.block_ids))
    seat.replica.residents.remove(sequence)
    seat.replica.end(sequence.slot)


def _start(sequence: Sequence, *, num_cached: int, samples: bool) -> SequenceStart:
    knows = samples and sequence.sampling.has_penalties
    return SequenceStart(
        slot=sequence.slot,
        request_id=sequence.request_id,
        num_cached_positions=num_cached,
        sampling=sequence.sampling if samples else None,
        known_token_ids=tuple(sequence.token_ids) if knows else (),
        num_prompt_tokens=sequence.num_prompt_tokens if knows else 0,
        traceparent=sequence.traceparent,
    )
