"""One span for each traced sequence in this stage, made when it ends.

Times are those of the micro-batches that the sequence was in, as the sequence lived
through them: `compute` whole steps, not its share of their rows; `wait` from a
micro-batch being ready to its step; `wire` from the compute thread to the socket.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from opentelemetry.trace import Tracer

from core import telemetry as names
from core.pipeline.batch import MicroBatch, SequenceStart, SequenceUpdates
from services.common.telemetry import context_from
from services.stage.job import Performed


@dataclass(kw_only=True)
class _Traced:
    start: SequenceStart
    began_ns: int  # since the epoch of Unix: spans are wall-clock
    compute_ns: int = 0
    wait_ns: int = 0
    wire_ns: int = 0
    rows: int = 0
    micro_batches: int = 0


class SequenceSpans:
    """Collects the times of traced sequences. Costs nothing while there are none."""

    def __init__(self, tracer: Tracer, *, stage_index: int) -> None:
        self._tracer = tracer
        self._stage_index = stage_index
        self._by_slot: dict[int, _Traced] = {}
        self._on_wire: dict[int, list[_Traced]] = {}

    def note_performed(self, performed: Performed) -> None:
        """Adds an order that was performed; ends the spans of sequences that it ends."""
        order = performed.order
        updates = order if isinstance(order, SequenceUpdates) else order.updates
        for slot in updates.ended_slots:
            self._end(slot)
        for start in updates.starts:
            if start.traceparent:
                began_ns = time.time_ns() - performed.compute_ns
                self._by_slot[start.slot] = _Traced(start=start, began_ns=began_ns)
        if self._by_slot and isinstance(order, MicroBatch):
            self._note_micro_batch(performed, order)

    def note_wire(self, micro_batch_id: int, duration_ns: int, *, last: bool) -> None:
        """Adds the time that a frame of a micro-batch spent on its way to the socket."""
        for traced in self._on_wire.get(micro_batch_id, ()):
            traced.wire_ns += duration_ns
        if last:
            self._on_wire.pop(micro_batch_id, None)

    def forget_wire(self) -> None:
        """Counts no more of what is on its way: some of it will never be sent."""
        self._on_wire.clear()

    def end_all(self) -> None:
        """Ends the spans of all sequences: the session is over."""
        for slot in list(self._by_slot):
            self._end(slot)
        self._on_wire.clear()

    def _note_micro_batch(self, performed: Performed, batch: MicroBatch) -> None:
        present = []
        for slot, num_rows in zip(batch.slots_R.tolist(), batch.num_rows_R.tolist(), strict=True):
            traced = self._by_slot.get(slot)
            if traced is not None:
                traced.compute_ns += performed.compute_ns
                traced.wait_ns += performed.wait_ns
                traced.rows += num_rows
                traced.micro_batches += 1
                present.append(traced)
        if performed.requests and present:
            self._on_wire[batch.id] = present

    def _end(self, slot: int) -> None:
        traced = self._by_slot.pop(slot, None)
        if traced is None:
            return
        span = self._tracer.start_span(
            names.STAGE_SPAN.name,
            context=context_from(traced.start.traceparent),
            start_time=traced.began_ns,
            attributes={
                names.STAGE: self._stage_index,
                names.REQUEST_ID: str(traced.start.request_id),
                names.COMPUTE_SECONDS: traced.compute_ns / 1e9,
                names.WAIT_SECONDS: traced.wait_ns / 1e9,
                names.WIRE_SECONDS: traced.wire_ns / 1e9,
                names.SEQUENCE_ROWS: traced.rows,
                names.SEQUENCE_MICRO_BATCHES: traced.micro_batches,
            },
        )
        span.end()
