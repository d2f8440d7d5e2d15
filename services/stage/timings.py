"""Where a stage's time goes: for reports to the coordinator and for metrics."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration
from penstock.v1 import stage_pb2

from core.pipeline.batch import MicroBatch, SequenceUpdates
from services.stage.job import Performed
from services.stage.starvation import NOT_STARVED, Starvation


@dataclass(kw_only=True)
class Totals:
    """Sums since the process started; durations in ns."""

    busy_ns: int = 0
    stolen_ns: int = 0
    starved: Starvation = NOT_STARVED
    wire_ns: int = 0
    serialise_ns: int = 0
    rows: int = 0
    micro_batches: int = 0


@dataclass(kw_only=True)
class _Window:
    """What has happened since the last report."""

    started_ns: int
    before: Totals
    batch_rows: list[int] = field(default_factory=list)
    batch_compute_us: list[int] = field(default_factory=list)


class Timings:
    """Adds times up, and cuts them into reports. Belongs to the event loop's thread."""

    def __init__(self, totals: Totals, *, now_ns: int) -> None:
        self._totals = totals
        self._window = _Window(started_ns=now_ns, before=_copy(totals))

    @property
    def has_news(self) -> bool:
        """Whether anything has been computed since the last report."""
        return bool(self._window.batch_rows)

    def note_performed(self, performed: Performed) -> None:
        """Adds a micro-batch."""
        if not isinstance(performed.order, MicroBatch):
            return
        totals, num_rows = self._totals, performed.order.num_rows
        totals.busy_ns += performed.compute_ns
        totals.stolen_ns += performed.stolen_ns
        totals.starved += performed.starved
        totals.serialise_ns += performed.serialise_ns
        if performed.order.replays:  # nothing was computed: no measure of what computing takes
            return
        totals.rows += num_rows
        totals.micro_batches += 1
        self._window.batch_rows.append(num_rows)
        self._window.batch_compute_us.append(performed.compute_ns // 1000)

    def note_wire(self, duration_ns: int) -> None:
        """Adds the time that a frame took from the compute thread to the socket."""
        self._totals.wire_ns += duration_ns

    def note_serialise(self, duration_ns: int) -> None:
        """Adds time spent turning frames into activations."""
        self._totals.serialise_ns += duration_ns

    def report(self, *, now_ns: int, kv_blocks_used: int) -> stage_pb2.StageReport:
        """Returns what has happened since the last report, and begins anew."""
        window, totals = self._window, self._totals
        before = window.before
        starved = totals.starved - before.starved
        report = stage_pb2.StageReport(
            interval=_duration(now_ns - window.started_ns),
            busy=_duration(totals.busy_ns - before.busy_ns),
            starved=_duration(starved.total_ns),
            wire=_duration(totals.wire_ns - before.wire_ns),
            serialise=_duration(totals.serialise_ns - before.serialise_ns),
            batch_rows=window.batch_rows,
            batch_compute_us=window.batch_compute_us,
            kv_blocks_used=kv_blocks_used,
            stolen=_duration(totals.stolen_ns - before.stolen_ns),
            starved_for_schedule=_duration(starved.schedule_ns),
            starved_for_upstream=_duration(starved.upstream_ns),
            starved_by_wire=_duration(starved.wire_ns),
            starved_by_serialising=_duration(starved.serialise_ns),
        )
        self._window = _Window(started_ns=now_ns, before=_copy(totals))
        return report


class KvBlockCount:
    """Counts the KV blocks that live sequences hold, as orders are performed."""

    def __init__(self) -> None:
        self._by_slot: defaultdict[int, list[int]] = defaultdict(list)
        self._num_holders: defaultdict[int, int] = defaultdict(int)

    @property
    def num_used(self) -> int:
        """A block that several sequences share counts once."""
        return len(self._num_holders)

    def note(self, updates: SequenceUpdates) -> None:
        """Adds updates that have been applied."""
        for slot in updates.ended_slots:
            for block in self._by_slot.pop(slot, ()):
                self._num_holders[block] -= 1
                if not self._num_holders[block]:
                    del self._num_holders[block]
        for slot, block in zip(updates.block_slots, updates.block_ids, strict=True):
            self._by_slot[slot].append(block)
            self._num_holders[block] += 1


def _copy(totals: Totals) -> Totals:
    return Totals(**vars(totals))


def _duration(nanoseconds: int) -> Duration:
    return Duration(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)
