"""One replica of a stage as the scheduler sees it: its blocks, its times, what is in flight
through it, and what it has yet to be told.

A replica performs its orders first in, first out, whichever path they are of.
"""

from __future__ import annotations

from collections.abc import Sequence as List

from core.cache.blocks import BlockAllocator
from core.pipeline.batch import SequenceStart, SequenceUpdates
from core.pipeline.cut import Part
from core.pipeline.events import ReplicaFacts, StageReported
from core.pipeline.flights import Flight, FlightHistory, Observations
from core.pipeline.sequences import Seat, Sequence
from core.pipeline.stage_times import StageTimes

_NOTHING = SequenceUpdates()


class Replica:
    """Everything but which paths it is part of."""

    def __init__(
        self,
        replica_id: int,
        *,
        facts: ReplicaFacts,
        block_size: int,
        times: StageTimes,
    ) -> None:
        self.id = replica_id
        self.facts = facts
        self.block_size = block_size
        self.times = times
        self.allocator = BlockAllocator(facts.num_kv_blocks)
        self.residents: set[Sequence] = set()  # those that have a seat on it
        self.flights: dict[int, Flight] = {}  # by id, the oldest first
        self.history = FlightHistory()
        self.performed_id = 0  # it is known to have performed, or abandoned, all up to this one
        self.is_lost = False
        self.is_draining = False
        self.is_evacuated = False  # draining, and those who are on it shall leave now
        self.slow_share = 0.0  # of its latest micro-batches, those that were far too slow
        self.is_resting = False  # it was far too slow
        self.rest_s = self.rests_until_s = 0.0  # how long the latest rest is, and its end
        self.is_told = True  # there are no updates
        self._forget()

    @property
    def part(self) -> Part:
        """What it holds."""
        return self.facts.part

    @property
    def is_left(self) -> bool:
        """Whether those who are on it shall leave now."""
        return self.is_evacuated or self.is_resting

    def observe(self, event: StageReported) -> List[Observations]:
        """Learns from a report; returns what it says of micro-batches."""
        self.performed_id = max(self.performed_id, event.performed_id)
        observations = self.history.match(
            event.batch_rows, event.batch_seconds, performed_id=event.performed_id
        )
        for overlapped, seen in zip((False, True), observations, strict=True):
            if seen.rows:
                self.times.observe(
                    overlapped=overlapped, rows=seen.rows, pairs=seen.pairs, seconds=seen.seconds
                )
        return observations

    def cycle_s(self, num_sequences: int, *, mean_context: float = 64.0) -> float:
        """Seconds that it takes for a row of each of `num_sequences`."""
        return self.times.overlapped.seconds(num_sequences, num_sequences * mean_context)

    # --- what it must hear

    @property
    def has_news(self) -> bool:
        """Whether it must hear of more than sequences that ended."""
        return bool(self._starts or self._block_slots or self._rewind_slots)

    def start(self, start: SequenceStart, seat: Seat) -> None:
        """A sequence begins, with the blocks that its seat has already."""
        self.is_told = False
        self._starts.append(start)
        self._block_slots += [start.slot] * len(seat.block_ids)
        self._block_ids += seat.block_ids

    def grow(self, slot: int, seat: Seat, count: int) -> None:
        """Adds free blocks to a seat; raises Exhausted."""
        self.is_told = False
        blocks = self.allocator.allocate(count)
        seat.block_ids += blocks
        self._block_ids += blocks
        self._block_slots += [slot] * count

    def rewind(self, slot: int, position: int) -> None:
        """The sequence forgets what it computed from a position on."""
        self.is_told = False
        self._rewind_slots.append(slot)
        self._rewind_positions.append(position)

    def end(self, slot: int) -> None:
        """A sequence ends of which nothing else is left to be told."""
        self.is_told = False
        self._ended_slots.append(slot)

    def take_updates(self) -> SequenceUpdates:
        """What it must hear now."""
        if self.is_told:
            return _NOTHING
        updates = SequenceUpdates(
            ended_slots=tuple(self._ended_slots),
            starts=tuple(self._starts),
            block_slots=tuple(self._block_slots),
            block_ids=tuple(self._block_ids),
            rewind_slots=tuple(self._rewind_slots),
            rewind_positions=tuple(self._rewind_positions),
        )
        self.is_told = True
        self._forget()
        return updates

    def _forget(self) -> None:
        self._ended_slots: list[int] = []
        self._starts: list[SequenceStart] = []
        self._block_slots: list[int] = []
        self._block_ids: list[int] = []
        self._rewind_slots: list[int] = []
        self._rewind_positions: list[int] = []
