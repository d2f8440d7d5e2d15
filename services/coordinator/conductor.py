"""Performs what the scheduler decides.

Everything that happens in one turn of the event loop is handed to the scheduler at once; its
orders to stages and its news to gateways leave when the turn ends. There are no locks and no
tasks here: `post` and the turn run on the loop's thread, one after the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.v1 import coordinator_pb2, stage_pb2

from core import telemetry as names
from core.errors import InvalidInput, PenstockError
from core.pipeline.actions import (
    Action,
    DropPipeline,
    EmitTokens,
    FlushUpdates,
    Refuse,
    RunMicroBatch,
    Usage,
)
from core.pipeline.events import (
    Event,
    PipelineLost,
    PipelineReady,
    RequestArrived,
    RequestCancelled,
    Tick,
)
from core.pipeline.scheduler import Scheduler, SchedulerSettings
from core.pipeline.speculation import SpeculationSettings
from services.common.health import HealthService
from services.common.telemetry import Telemetry
from services.coordinator import messages
from services.coordinator.fit import pipeline_facts
from services.coordinator.gateway_stream import GatewayStream
from services.coordinator.mesh import MeshView, Window
from services.coordinator.pipeline_link import PipelineLink
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.spans import RequestSpans

_LOG = logging.getLogger(__name__)
_TICK_S = 0.05


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request of a gateway that has not ended."""

    gateway: GatewayStream
    gateway_request_id: int
    traceparent: str
    arrived_ns: int  # Unix time


class Conductor:
    """The coordinator's loop: events of stages and gateways in, messages out."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        telemetry: Telemetry,
        health: HealthService,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._health = health
        self._clock = clock
        self._spans = RequestSpans(telemetry)
        self._rows_histogram = telemetry.histogram(names.MICRO_BATCH_ROWS)
        self._queue_histogram = telemetry.histogram(names.QUEUE_DURATION)
        self._labels: dict[str, str] = {}  # of both histograms
        self.scheduler = Scheduler(
            SchedulerSettings(
                max_waiting=settings.max_waiting,
                micro_batch_timeout_s=settings.micro_batch_timeout_s,
                shares_prefixes=settings.prefix_cache,
                speculation=SpeculationSettings(max_draft_tokens=settings.speculation),
            )
        )
        self.mesh = MeshView(settings.stages, clock())
        self.link = PipelineLink(settings, self)
        self._events: list[Event] = []
        self._is_turn_due = False
        self._requests: dict[int, OpenRequest] = {}
        self._next_request_id = 1
        self._gateways: set[GatewayStream] = set()
        self._touched: set[GatewayStream] = set()
        self._tokens = Window(1)
        self._tokens_counted = 0
        self._is_stopping = False
        self._health_changed = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- tasks of the process

    async def run(self) -> None:
        """Keeps the pipeline open and time passing; ends by raising only."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.link.run())
            group.create_task(self._tick())
            group.create_task(self._keep_health())
            group.create_task(self._watch())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            has_progress = self._count_tokens()
            if self._requests and not has_progress:
                self.post(Tick())

    async def _watch(self) -> None:
        """A failed turn is our own bug: it ends the process rather than leaving it dumb."""
        await self._failed

    async def _keep_health(self) -> None:
        while True:
            await self._health_changed.wait()
            self._health_changed.clear()
            await self._health.set("", serving=self.mesh.is_ready)
            model = self.mesh.model_name
            if not model:
                continue
            await self._health.set(model, serving=self.mesh.is_ready)
            for index, stage in enumerate(self.mesh.stages):
                await self._health.set(f"{model}/stage/{index}", serving=stage.is_ready)

    async def stop(self) -> None:
        """Refuses what is open and lets every gateway's stream end."""
        self._is_stopping = True
        await self._health.stop_serving()
        self._events.append(PipelineLost(reason="the coordinator is stopping"))
        self._turn()
        for gateway in self._gateways:
            gateway.close()

    # --- gateways

    def connect(self) -> GatewayStream:
        """Takes a gateway in."""
        gateway = GatewayStream()
        gateway.set_mesh(self.mesh.state())
        self._gateways.add(gateway)
        if self._is_stopping:
            gateway.close()
        return gateway

    def disconnect(self, gateway: GatewayStream) -> None:
        """Lets a gateway go; its open requests are cancelled."""
        self._gateways.discard(gateway)
        for request_id in gateway.request_ids.values():
            self.post(RequestCancelled(request_id=request_id))

    def receive(self, gateway: GatewayStream, request: coordinator_pb2.ConnectRequest) -> None:
        """Takes what a gateway asks for; requests that are wrong are refused one by one."""
        for submission in request.submissions:
            try:
                self._submit(gateway, submission)
            except PenstockError as error:
                update = gateway.add_update(submission.request_id)
                messages.write_refusal(update, Refuse(request_id=0, error=error))
                gateway.wake()
        for cancellation in request.cancellations:
            request_id = gateway.request_ids.get(cancellation.request_id)
            if request_id is not None:
                self.post(RequestCancelled(request_id=request_id))

    def _submit(self, gateway: GatewayStream, submission: coordinator_pb2.Submission) -> None:
        if submission.request_id in gateway.request_ids:
            raise InvalidInput("request_id", submission.request_id, "unique within the stream")
        token_ids = list(submission.token_ids)
        vocab_size = self.mesh.vocab_size
        if vocab_size and token_ids and max(token_ids) >= vocab_size:
            raise InvalidInput("token_ids", max(token_ids), f"ids below {vocab_size}")
        sampling = messages.sampling_parameters(submission.sampling)
        deadline_s = None
        if submission.HasField("timeout"):
            deadline_s = self._clock() + messages.seconds(submission.timeout)
        request_id = self._next_request_id
        self._next_request_id += 1
        gateway.request_ids[submission.request_id] = request_id
        self._requests[request_id] = OpenRequest(
            gateway, submission.request_id, submission.traceparent, time.time_ns()
        )
        self.post(
            RequestArrived(
                request_id=request_id,
                token_ids=token_ids,
                sampling=sampling,
                deadline_s=deadline_s,
                traceparent=submission.traceparent,
                cache_salt=submission.cache_salt,
            )
        )

    # --- the pipeline (PipelineListener)

    def on_stage_ready(self, stage_index: int, ready: stage_pb2.StageReady) -> None:
        self.mesh.stage_ready(stage_index, ready)
        self._tell_mesh()

    def on_pipeline_ready(self, stages: Sequence[stage_pb2.StageReady]) -> None:
        self.mesh.pipeline_ready(self._clock())
        self._labels = {names.MODEL: self.mesh.model_name}
        facts = pipeline_facts(stages, num_slots=self._settings.max_sequences)
        self.post(PipelineReady(facts=facts))
        self._tell_mesh()

    def on_sampled(self, message: stage_pb2.SampledTokens) -> None:
        if message.sent_unix_ns:
            wire_ns = time.time_ns() - message.sent_unix_ns
            self.mesh.return_wire_s += max(0, wire_ns) * 1e-9
        self._events.append(messages.tokens_sampled(message))
        self._guarded_turn()  # at once: stages may be waiting for what comes next

    def on_report(self, stage_index: int, report: stage_pb2.StageReport) -> None:
        self.mesh.stages[stage_index].add(report, self._clock())
        # Nothing to act upon: it waits for the next turn.
        self._events.append(messages.stage_reported(stage_index, report))

    def on_pipeline_lost(self, stage_index: int | None, reason: str) -> None:
        self.mesh.pipeline_lost(stage_index, reason)
        self.post(PipelineLost(reason=reason))
        self._tell_mesh()

    def _tell_mesh(self) -> None:
        state = self.mesh.state()
        for gateway in self._gateways:
            gateway.set_mesh(state)
        self._health_changed.set()

    # --- turns

    def post(self, event: Event) -> None:
        """Adds an event to this turn of the loop."""
        if not self._is_turn_due:
            self._is_turn_due = True
            asyncio.get_running_loop().call_soon(self._guarded_turn)
        self._events.append(event)

    def _guarded_turn(self) -> None:
        try:
            self._turn()
        except Exception as error:
            if not self._failed.done():
                self._failed.set_exception(error)

    def _turn(self) -> None:
        self._is_turn_due = False
        events, self._events = self._events, []
        actions = self.scheduler.handle_all(events, self._clock())
        # Stages wait for their orders, and gateways for nothing: the two do not meet.
        for action in actions:
            if isinstance(action, RunMicroBatch):
                self._launch(action)
        for action in actions:
            if not isinstance(action, RunMicroBatch):
                self._perform(action)
        for gateway in self._touched:
            gateway.wake()
        self._touched.clear()

    def _launch(self, action: RunMicroBatch) -> None:
        for stage, request in enumerate(messages.micro_batch_requests(action)):
            self.link.send(stage, request)
        self._rows_histogram.record(len(action.token_ids_T), self._labels)

    def _perform(self, action: Action) -> None:
        match action:
            case EmitTokens():
                self._emit(action)
            case Refuse():
                self._refuse(action)
            case FlushUpdates():
                for stage, updates in enumerate(action.updates_S):
                    self.link.send(stage, messages.updates_request(updates))
            case DropPipeline():
                self.link.drop(action.reason)

    def _emit(self, action: EmitTokens) -> None:
        request = self._requests[action.request_id]
        gateway = request.gateway
        self._touched.add(gateway)
        if action.finish_reason is None and not action.logprobs:
            gateway.add_tokens(request.gateway_request_id, action.token_ids)
            return
        messages.write_news(gateway.add_update(request.gateway_request_id), action)
        if action.finish_reason is not None:
            self._end(action.request_id, action.usage, action.finish_reason.value)

    def _refuse(self, action: Refuse) -> None:
        request = self._requests[action.request_id]
        update = request.gateway.add_update(request.gateway_request_id)
        messages.write_refusal(update, action)
        self._touched.add(request.gateway)
        self._end(action.request_id, action.usage, "error")

    def _end(self, request_id: int, usage: Usage | None, finish_reason: str) -> None:
        request = self._requests.pop(request_id)
        del request.gateway.request_ids[request.gateway_request_id]
        if usage is not None:
            self._queue_histogram.record(usage.queue_s, self._labels)
            self._spans.record(
                traceparent=request.traceparent,
                request_id=request_id,
                arrived_ns=request.arrived_ns,
                usage=usage,
                finish_reason=finish_reason,
            )

    # --- what people see

    def _count_tokens(self) -> bool:
        """Whether there are any since it was last asked."""
        total = self.scheduler.num_tokens
        if total == self._tokens_counted:
            return False
        self._tokens.add(self._clock(), total - self._tokens_counted)
        self._tokens_counted = total
        return True

    def describe(self) -> coordinator_pb2.GetMeshResponse:
        """The mesh as it is now."""
        now_s = self._clock()
        self._count_tokens()
        scheduler, mesh = self.scheduler, self.mesh
        used_S = scheduler.kv_blocks_used_S or [0] * len(mesh.stages)
        response = coordinator_pb2.GetMeshResponse(
            model=mesh.model(),
            stages=[
                mesh.stage_state(index, now_s=now_s, kv_blocks_used=used)
                for index, used in enumerate(used_S)
            ],
            requests_waiting=scheduler.num_waiting,
            requests_running=scheduler.num_running,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            tokens_per_second=max(self._tokens.sums(now_s)[0], 0.0) / mesh.window_s(now_s),
            tokens_guessed=scheduler.speculation.num_drafted,
            tokens_guessed_right=scheduler.speculation.num_accepted,
        )
        response.uptime.CopyFrom(messages.duration(now_s - mesh.started_s))
        return response
