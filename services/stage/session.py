"""A stage's part in one incarnation of a replica: from OpenPipeline to the stream's end.

A session joins the parts: orders go to the compute thread, activations come from upstream and
go downstream, results and reports go to the coordinator. A link that breaks ends alone; whatever
else breaks ends the whole session with the error, and a new one begins with a new epoch.
Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import MalformedMessage, PenstockError, ProtocolViolation
from core.pipeline.batch import MicroBatch, SampledTokens
from core.wire.frames import MAX_FRAME_BYTES, CompleteActivations
from services.common.channels import Dial, open_channel
from services.common.shortcut import Door, Shortcut, parse
from services.common.telemetry import Telemetry
from services.stage.job import NO_ROUTE, Job, Order, Outlet, Performed, Route
from services.stage.links import Links
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
from services.stage.worker import Worker

_LOG = logging.getLogger(__name__)
# The policy looks at what was measured twice a second.
REPORT_INTERVAL_S = 0.25
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
        dial: Dial = open_channel,
    ) -> None:
        """Raises ProtocolViolation when the order does not fit the model.

        `initial_credits` overrides what follows from the sizes of model and micro-batches.
        Without `offers_shortcuts` all messages travel over gRPC.
        """
        _check_place(order, model)
        manifest = model.manifest
        self._shortcut: Shortcut | None = None
        self._door: Door | None = None
        self.epoch = order.epoch
        self.stage_index = order.stage_index
        self.responses: Outbox[stage_pb2.ControlResponse] = Outbox()
        self.links = Links(
            self,
            hidden_size=manifest.hidden_size,
            codec=model.codec,
            initial_credits=initial_credits or credits_for(manifest),
            offers_shortcuts=offers_shortcuts,
            dial=dial,
        )
        self._offers_shortcuts = offers_shortcuts
        self._model = model
        self._worker = worker
        self._limits = OrderLimits(
            max_rows=manifest.max_rows,
            vocab_size=manifest.vocab_size,
            context_length=manifest.context_length,
            is_first=model.is_first,
            is_last=model.is_last,
        )
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
        self._job = Job(self, codec=model.codec)

    @property
    def kv_blocks_used(self) -> int:
        return self._blocks.num_used

    async def open(self) -> None:
        """Clears the engine, and tells the coordinator when that is done."""
        self._worker.open(self._job)
        await self._opened.wait()
        ready = stage_pb2.ControlResponse(ready=self._model.manifest)
        if self._offers_shortcuts:
            self._door = Door(self._on_entered)
            ready.ready.shortcut = self._door.address
            ready.ready.shortcut_token = self._door.token
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
        self.links.close()
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
            self._take_micro_batch(request.micro_batch)
        elif kind == "updates":
            self._submit(decode_updates(request.updates, self._limits))
        elif kind == "report":
            self._report()
        elif kind == "open_downstream":
            self._open_downstream(request.open_downstream)
        elif kind == "abandon":
            self.links.abandon(request.abandon.ids)
            self._worker.abandon(self._job, request.abandon.ids)
        elif kind == "open":
            raise ProtocolViolation("the pipeline is open; a new epoch needs a new stream")
        else:
            raise MalformedMessage("an order without content")

    def _take_micro_batch(self, message: stage_pb2.MicroBatch) -> None:
        wire_ns = wire_ns_since(message.sent_unix_ns)
        batch = decode_micro_batch(message, self._limits)
        if batch.id <= self._last_id:
            raise ProtocolViolation(f"micro-batch {batch.id} is ordered after {self._last_id}")
        self._last_id = batch.id
        route = self.links.route(message)
        self._submit(batch, wire_ns=wire_ns, route=route)
        self.links.expect(batch, route)

    def _open_downstream(self, order: stage_pb2.OpenDownstream) -> None:
        if self._model.is_last:
            raise ProtocolViolation("there is no stage behind the last one")
        self.links.open_downstream(order)

    def _submit(self, order: Order, *, wire_ns: int = 0, route: Route = NO_ROUTE) -> None:
        if self._num_pending >= MAX_PENDING_ORDERS:
            raise ProtocolViolation(f"{MAX_PENDING_ORDERS} orders are pending already")
        self._num_pending += 1
        arrival = Arrival(at_ns=time.perf_counter_ns(), wire_ns=wire_ns)
        self._worker.submit(self._job, order, arrival, route=route)

    # Activations from upstream.

    def on_activations(self, activations: CompleteActivations, arrival: Arrival) -> None:
        self._worker.deliver(self._job, activations, arrival)

    def on_assembled(self, duration_ns: int) -> None:
        self._timings.note_serialise(duration_ns)

    # Results of the compute thread.

    def on_opened(self) -> None:
        self._opened.set()

    def answer_now(self, sampled: SampledTokens) -> bool:
        if self._shortcut is None:
            return False
        self._shortcut.send(_sampled_response(sampled).SerializeToString())
        return True

    def on_performed(self, performed: Performed) -> None:
        if self.responses.closed:
            return
        self._num_pending -= 1
        if performed.num_sent is None:
            self._send(performed)  # first what others wait for
        if performed.num_frames_taken:
            self.links.give_back(performed.route, performed.num_frames_taken)
        self._note(performed)
        outlet = performed.route.outlet
        if outlet is None:
            return
        for request in performed.requests[: performed.num_sent or 0]:
            is_last = request is performed.requests[-1]
            self.on_sent(outlet, request.frame.micro_batch_id, performed.send_ns, last=is_last)

    def on_failure(self, error: Exception) -> None:
        self.close(error)

    def _send(self, performed: Performed) -> None:
        if performed.requests and performed.route.outlet is not None:
            performed.route.outlet.send(performed.requests, made_ns=performed.ended_ns)
        if performed.sampled is not None:
            self.responses.put(_sampled_response(performed.sampled))

    # Links downstream.

    def on_stands(self, link: Outlet) -> None:
        state = stage_pb2.LinkState(link_id=link.link_id, stands=True)
        self.responses.put(stage_pb2.ControlResponse(link=state))

    def on_sent(self, link: Outlet, micro_batch_id: int, duration_ns: int, *, last: bool) -> None:
        link.num_sent += 1
        self._worker.note_room(self._job)
        self._timings.note_wire(duration_ns)
        if self._spans is not None:
            self._spans.note_wire(micro_batch_id, duration_ns, last=last)

    def on_broken(self, link: Outlet, error: Exception) -> None:
        unforeseen = None if isinstance(error, PenstockError) else error
        facts = {"link": link.link_id, "why": str(error)}
        _LOG.warning("link broken", extra=facts, exc_info=unforeseen)
        self.links.forget_downstream(link.link_id)
        self._worker.note_room(self._job)
        if self._spans is not None:
            self._spans.forget_wire()
        state = stage_pb2.LinkState(link_id=link.link_id, problem=str(error))
        self.responses.put(stage_pb2.ControlResponse(link=state))

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
        now_ns, began_ns = time.perf_counter_ns(), self._job.began_ns
        report = self._timings.report(now_ns=now_ns, kv_blocks_used=self._blocks.num_used)
        report.performed_id = self._job.performed_id
        report.computing.FromNanoseconds(now_ns - began_ns if began_ns else 0)
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
