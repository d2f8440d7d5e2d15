"""A stage's part in one incarnation of a pipeline: from OpenPipeline to the stream's end.

A session joins the parts: orders go to the compute thread, activations come from
upstream and go downstream, results and reports go to the coordinator. Whatever
breaks ends the whole session with the error; a new one begins with a new epoch.
Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import socket
import time

from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import MalformedMessage, ProtocolViolation
from core.pipeline.batch import MicroBatch, SampledTokens
from core.wire.frames import MAX_FRAME_BYTES, CompleteActivations, FrameAssembler
from services.common.shortcut import Door, Shortcut, parse
from services.common.telemetry import Telemetry
from services.stage.downstream_link import DownstreamLink
from services.stage.job import Job, Order, Performed
from services.stage.model import LoadedModel
from services.stage.orders import (
    OrderLimits,
    decode_micro_batch,
    decode_updates,
    encode_sampled,
)
from services.stage.outbox import Outbox
from services.stage.sequence_spans import SequenceSpans
from services.stage.starvation import Arrival, wire_ns_since
from services.stage.timings import KvBlockCount, Timings, Totals
from services.stage.upstream_link import UpstreamLink
from services.stage.worker import Worker

REPORT_INTERVAL_S = 0.1
# Schedules run a few micro-batches ahead; a coordinator this far ahead is out of order.
MAX_PENDING_ORDERS = 4096
MIN_CREDITS = 64
# Loading takes seconds to minutes for big models, and stages begin in any order.
OPEN_TIMEOUT_S = 600.0


class Session:
    """One epoch of this stage."""

    def __init__(
        self,
        order: stage_pb2.OpenPipeline,
        *,
        model: LoadedModel,
        worker: Worker[LoadedModel],
        totals: Totals,
        telemetry: Telemetry,
        initial_credits: int | None = None,
        offers_shortcuts: bool = True,
    ) -> None:
        """Raises ProtocolViolation when the order does not fit the model.

        `initial_credits` overrides what follows from the sizes of model and micro-batches.
        Without `offers_shortcuts` all messages travel over gRPC.
        """
        _check_place(order, model)
        manifest = model.manifest
        self._shortcut: Shortcut | None = None
        self._door: Door | None = None
        credits = initial_credits or credits_for(manifest)
        self.epoch = order.epoch
        self.stage_index = order.stage_index
        self.responses: Outbox[stage_pb2.ControlResponse] = Outbox()
        self.upstream = UpstreamLink(
            self,
            assembler=FrameAssembler(manifest.hidden_size, model.codec, epoch=order.epoch),
            initial_credits=credits,
            offers_shortcut=offers_shortcuts,
        )
        self._offers_shortcuts = offers_shortcuts
        self._model = model
        self._worker = worker
        self._limits = OrderLimits(
            max_rows=manifest.max_rows,
            vocab_size=manifest.vocab_size,
            is_first=model.is_first,
            is_last=model.is_last,
        )
        self._downstream_address = order.downstream_address
        self._downstream: DownstreamLink | None = None
        self._opened = asyncio.Event()
        self._num_pending = 0
        self._last_id = -1
        self._blocks = KvBlockCount()
        self._timings = Timings(totals, now_ns=time.perf_counter_ns())
        self._report_timer: asyncio.TimerHandle | None = None
        self._spans = (
            SequenceSpans(telemetry.tracer, stage_index=order.stage_index)
            if telemetry.tracing
            else None
        )
        self._job = Job(
            self,
            epoch=order.epoch,
            codec=model.codec,
            is_first=model.is_first,
            max_unsent_frames=credits,
        )

    @property
    def kv_blocks_used(self) -> int:
        return self._blocks.num_used

    async def open(self) -> None:
        """Clears the engine, dials the next stage and tells the coordinator when both are done.

        Raises Unavailable when the next stage cannot be reached.
        """
        self._worker.open(self._job)
        if self._downstream_address:
            self._downstream = DownstreamLink(
                self, address=self._downstream_address, epoch=self.epoch
            )
            await self._downstream.stands(timeout_s=OPEN_TIMEOUT_S)
        await self._opened.wait()
        ready = stage_pb2.ControlResponse(ready=self._model.manifest)
        if self._offers_shortcuts:
            self._door = Door(self._on_entered)
            ready.ready.shortcut = self._door.address
        self.responses.put(ready)

    def close(self, error: Exception | None = None) -> None:
        """Ends everything that belongs to the session; the coordinator's stream ends with `error`.

        Only the first call counts.
        """
        if self.responses.closed:
            return
        self.responses.close(error)
        if self._door is not None:
            self._door.close()
        if self._shortcut is not None:
            self._shortcut.close()
        self.upstream.close()
        if self._downstream is not None:
            self._downstream.close()
        if self._report_timer is not None:
            self._report_timer.cancel()
        if self._spans is not None:
            self._spans.end_all()
        self._worker.close(self._job)

    # Orders of the coordinator.

    def _on_entered(self, connection: socket.socket) -> None:
        self._shortcut = Shortcut(connection, on_message=self._take_message, on_end=self.close)

    def _take_message(self, message: bytes) -> None:
        self.take_order(parse(stage_pb2.ControlRequest, message))

    def take_order(self, request: stage_pb2.ControlRequest) -> None:
        """Takes an order; raises ProtocolViolation or InvalidInput when it does not fit."""
        kind = request.WhichOneof("order")
        if kind == "micro_batch":
            wire_ns = wire_ns_since(request.micro_batch.sent_unix_ns)
            batch = decode_micro_batch(request.micro_batch, self._limits)
            self._take_micro_batch(batch, wire_ns=wire_ns)
        elif kind == "updates":
            self._submit(decode_updates(request.updates, self._limits), wire_ns=0)
        elif kind == "report":
            self._report()
        elif kind == "open":
            raise ProtocolViolation("the pipeline is open; a new epoch needs a new stream")
        else:
            raise MalformedMessage("an order without content")

    def _take_micro_batch(self, batch: MicroBatch, *, wire_ns: int) -> None:
        if batch.id <= self._last_id:
            raise ProtocolViolation(f"micro-batch {batch.id} is ordered after {self._last_id}")
        self._last_id = batch.id
        self._submit(batch, wire_ns=wire_ns)
        if not self._model.is_first:
            self.upstream.expect(batch.id, batch.num_rows)

    def _submit(self, order: Order, *, wire_ns: int) -> None:
        if self._num_pending >= MAX_PENDING_ORDERS:
            raise ProtocolViolation(f"{MAX_PENDING_ORDERS} orders are pending already")
        self._num_pending += 1
        arrival = Arrival(at_ns=time.perf_counter_ns(), wire_ns=wire_ns)
        self._worker.submit(self._job, order, arrival)

    # Activations from upstream.

    def on_activations(self, activations: CompleteActivations, arrival: Arrival) -> None:
        self._worker.deliver(self._job, activations, arrival)

    def on_assembled(self, duration_ns: int) -> None:
        self._timings.note_serialise(duration_ns)

    # Results of the compute thread.

    def on_opened(self) -> None:
        self._opened.set()

    def send_now(
        self, requests: list[stage_pb2.ActivateRequest], sampled: SampledTokens | None
    ) -> int | None:
        if requests:
            return self._downstream.send_now(requests) if self._downstream is not None else None
        if sampled is None or self._shortcut is None:
            return None
        self._shortcut.send(_sampled_response(sampled).SerializeToString())
        return 0

    def on_performed(self, performed: Performed) -> None:
        if self.responses.closed:
            return
        self._num_pending -= 1
        if performed.num_sent is None:
            self._send(performed)  # first what others wait for
        if performed.num_frames_taken:
            self.upstream.give_back(performed.num_frames_taken)
        self._note(performed)
        for request in performed.requests[: performed.num_sent or 0]:
            is_last = request is performed.requests[-1]
            self.on_sent(request.frame.micro_batch_id, performed.send_ns, last=is_last)

    def on_failure(self, error: Exception) -> None:
        self.close(error)

    def _send(self, performed: Performed) -> None:
        if performed.requests and self._downstream is not None:
            self._downstream.send(performed.requests, made_ns=performed.ended_ns)
        if performed.sampled is not None:
            self.responses.put(_sampled_response(performed.sampled))

    # The link downstream.

    def on_sent(self, micro_batch_id: int, duration_ns: int, *, last: bool) -> None:
        self._worker.note_sent(self._job)
        self._timings.note_wire(duration_ns)
        if self._spans is not None:
            self._spans.note_wire(micro_batch_id, duration_ns, last=last)

    def on_broken(self, error: Exception) -> None:
        self.close(error)

    # Reports.

    def _note(self, performed: Performed) -> None:
        order = performed.order
        self._blocks.note(order.updates if isinstance(order, MicroBatch) else order)
        self._timings.note_performed(performed)
        if self._spans is not None:
            self._spans.note_performed(performed)
        if self._report_timer is None and self._timings.has_news:
            loop = asyncio.get_running_loop()
            self._report_timer = loop.call_later(REPORT_INTERVAL_S, self._report)

    def _report(self) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report_timer = None
        report = self._timings.report(
            now_ns=time.perf_counter_ns(), kv_blocks_used=self._blocks.num_used
        )
        self.responses.put(stage_pb2.ControlResponse(report=report))


def _sampled_response(sampled: SampledTokens) -> stage_pb2.ControlResponse:
    response = stage_pb2.ControlResponse(sampled=encode_sampled(sampled))
    response.sampled.sent_unix_ns = time.time_ns()
    return response


def credits_for(manifest: stage_pb2.StageReady) -> int:
    """Returns the first credits of a link: frames of two of the biggest micro-batches, at least 64.

    A micro-batch must fit what is left when a quarter is spent and not yet granted again.
    """
    element_bytes = 4 if manifest.codec == tensor_pb2.CODEC_F32 else 2
    rows_per_frame = max(1, MAX_FRAME_BYTES // (manifest.hidden_size * element_bytes))
    return max(MIN_CREDITS, 2 * -(-manifest.max_rows // rows_per_frame))


def _check_place(order: stage_pb2.OpenPipeline, model: LoadedModel) -> None:
    if order.stage_index >= order.num_stages:
        raise MalformedMessage(f"stage {order.stage_index} of {order.num_stages}")
    if (order.stage_index == 0) != model.is_first:
        raise ProtocolViolation(f"stage {order.stage_index} cannot begin at this stage's layers")
    if (order.stage_index + 1 == order.num_stages) != model.is_last:
        raise ProtocolViolation(f"stage {order.stage_index} cannot end at this stage's layers")
    if bool(order.downstream_address) == model.is_last:
        raise MalformedMessage("all stages but the last have an address downstream")
