"""Performs what the scheduler decides.

Everything that happens in one turn of the event loop is handed to the scheduler at once; its
orders to stages and its news to gateways leave when the turn ends. There are no locks and no
tasks here: `post` and the turn run on the loop's thread, one after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from math import inf

from penstock.v1 import coordinator_pb2, stage_pb2

from core import telemetry as names
from core.errors import Superseded
from core.pipeline.actions import (
    AbandonMicroBatches,
    Action,
    DropReplica,
    EmitTokens,
    FlushUpdates,
    Refuse,
    RunMicroBatch,
)
from core.pipeline.events import Event, Tick
from core.pipeline.scheduler import Scheduler
from core.pipeline.settings import SchedulerSettings
from core.pipeline.speculation import SpeculationSettings
from services.common.audit_trail import AuditTrail
from services.common.credentials import Credentials
from services.common.durations import duration
from services.common.health import HealthService
from services.common.telemetry import Telemetry
from services.coordinator import messages
from services.coordinator.gateway_stream import GatewayStream
from services.coordinator.mesh import MeshView, Window, window_s
from services.coordinator.replica_link import Incarnation, ReplicaLink
from services.coordinator.replicas import Replicas
from services.coordinator.requests import Requests
from services.coordinator.settings import CoordinatorSettings

_TICK_S = 0.1
# As coordinator.proto promises gateways.
_PULSE_S = 0.5


class Conductor:
    """The coordinator's loop: events of stages and gateways in, messages out."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        telemetry: Telemetry,
        health: HealthService,
        *,
        credentials: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._health = health
        self._clock = clock
        self._rows_histogram = telemetry.histogram(names.MICRO_BATCH_ROWS)
        self.scheduler = Scheduler(
            SchedulerSettings(
                max_waiting=settings.max_waiting,
                micro_batch_timeout_s=settings.micro_batch_timeout_s,
                lost_limit_s=settings.lost_limit_s,
                shares_prefixes=settings.prefix_cache,
                tenant_weights=settings.tenant_weights,
                speculation=SpeculationSettings(max_draft_tokens=settings.speculation),
            )
        )
        self.trail = AuditTrail(settings.audit)
        self.replicas = Replicas(settings, self, credentials=credentials)
        self.requests = Requests(telemetry, post=self.post, clock=clock)
        self.mesh = MeshView(self.replicas, clock())
        self._events: list[Event] = []
        self._is_turn_due = False
        self._has_mesh_changed = False
        self._tokens = Window(1)
        self._tokens_counted = 0
        self._health_changed = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked = asyncio.Event()
        self._first_ready_s = inf
        self._resume_grace_s = settings.resume_grace_s

    # --- tasks of the process

    async def run(self) -> None:
        """Keeps the replicas open and time passing; ends by raising only.

        Superseded: the gateways have been let go, and the process is of no more use. The one that
        is started in its place waits.
        """
        superseded: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._open_when_asked())
                group.create_task(self._tick())
                group.create_task(self._beat())
                group.create_task(self._keep_health())
                group.create_task(self._watch())
        except* Superseded as errors:
            superseded += errors.exceptions
        await self.stop()
        raise superseded[0]

    def take_over(self) -> None:
        """Opens the stages, whoever has them, unless it has them already."""
        if not self._asked.is_set():
            self._asked.set()
            self.mesh.is_waiting = False
            self.on_mesh_changed()

    async def _open_when_asked(self) -> None:
        await self._asked.wait()
        await self.replicas.run()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            has_progress = self._count_tokens()
            if self.requests.are_there_any and not has_progress:
                self.post(Tick())
            elif self._events:
                self._be_due()  # reports of an idle mesh
            self._let_drained_leave()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_PULSE_S)
            self.requests.beat()

    def _let_drained_leave(self) -> None:
        """What other coordinators' requests may have begun on stays until these have come."""
        if self._clock() - self._first_ready_s < self._resume_grace_s:
            return
        for link in list(self.replicas.links):
            incarnation = link.incarnation
            if link.is_draining and (
                incarnation is None or self.scheduler.is_drained(incarnation.replica_id)
            ):
                self.replicas.remove(link)

    async def _watch(self) -> None:
        """A failed turn is our own bug: it ends the process rather than leaving it dumb. So does
        another coordinator that has taken over."""
        await self._failed

    async def _keep_health(self) -> None:
        told: set[str] = set()  # stages may become fewer
        while True:
            await self._health_changed.wait()
            self._health_changed.clear()
            serving = self.mesh.serving()
            told |= serving.keys()
            for name in sorted(told):
                await self._health.set(name, serving=serving.get(name, False))

    async def stop(self) -> None:
        """Lets every gateway's stream end: they take their requests to the next coordinator."""
        await self._health.stop_serving()
        self.requests.close()

    def connect(self) -> GatewayStream:
        """Takes a gateway in."""
        return self.requests.connect(self.mesh.state())

    # --- replicas (MeshListener)

    def on_sampled(self, message: stage_pb2.SampledTokens) -> None:
        if message.sent_unix_ns:
            wire_ns = time.time_ns() - message.sent_unix_ns
            self.mesh.return_wire_s += max(0, wire_ns) * 1e-9
        self._events.append(messages.tokens_sampled(message))
        self._guarded_turn()  # at once: stages may be waiting for what comes next

    def on_report(self, replica: Incarnation, report: stage_pb2.StageReport) -> None:
        self.mesh.add_report(replica, report, self._clock())
        # Nothing to act upon: it waits for the next turn.
        self._events.append(messages.stage_reported(replica.replica_id, report))

    def on_mesh_changed(self) -> None:
        """Gateways hear of it when the scheduler has: it says what can be served."""
        self._has_mesh_changed = True
        self._be_due()

    def on_superseded(self, error: Superseded) -> None:
        self._fail(error)

    def _tell_mesh(self) -> None:
        self._has_mesh_changed = False
        self.mesh.is_ready = self.scheduler.is_ready
        if self.mesh.is_ready and self._first_ready_s == inf:
            self._first_ready_s = self._clock()
        manifest = self.replicas.manifest
        if manifest is not None:
            self.requests.vocab_size = manifest.vocab_size
            self.requests.labels = {names.MODEL: manifest.model}
        self.requests.tell_mesh(self.mesh.state())
        self._health_changed.set()

    # --- turns

    def post(self, event: Event) -> None:
        """Adds an event to this turn of the loop."""
        self._be_due()
        self._events.append(event)

    def _be_due(self) -> None:
        if not self._is_turn_due:
            self._is_turn_due = True
            asyncio.get_running_loop().call_soon(self._guarded_turn)

    def _guarded_turn(self) -> None:
        try:
            self._turn()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
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
            elif not isinstance(action, EmitTokens | Refuse):
                self._order(action)
        self._tell_news(actions)
        if self._has_mesh_changed:
            self._tell_mesh()

    def _launch(self, action: RunMicroBatch) -> None:
        requests = messages.micro_batch_requests(action, self.replicas.neighbours.id_of)
        for replica_id, request in zip(action.path, requests, strict=True):
            self.replicas.send(replica_id, request)
        self._rows_histogram.record(sum(action.num_rows_R), self.requests.labels)

    def _order(self, action: Action) -> None:
        match action:
            case FlushUpdates():
                self.replicas.send(action.replica_id, messages.updates_request(action.updates))
            case AbandonMicroBatches():
                self.replicas.send(action.replica_id, messages.abandon_request(action))
            case DropReplica():
                replica_id, reason = action.replica_id, action.reason
                self.replicas.drop(replica_id, reason)
                event, actor = "replica dropped", "coordinator"
                self.trail.record(event, actor, replica_id=replica_id, reason=reason)

    def _tell_news(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, EmitTokens):
                self.requests.emit(action)
            elif isinstance(action, Refuse):
                self.requests.refuse(action)
        self.requests.wake()

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
        rate_s = window_s(mesh.started_s, now_s)
        response = coordinator_pb2.GetMeshResponse(
            model=mesh.model(),
            stages=[self._replica_state(link, now_s) for link in self.replicas.links],
            requests_waiting=scheduler.num_waiting,
            requests_running=scheduler.num_running,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            tokens_per_second=max(self._tokens.sums(now_s)[0], 0.0) / rate_s,
            tokens_guessed=scheduler.speculation.num_drafted,
            tokens_guessed_right=scheduler.speculation.num_accepted,
            sequences_moved=scheduler.num_failovers,
            positions_restored=scheduler.num_restored_tokens,
            split=self.replicas.cut.split if self.replicas.cut is not None else "",
            term=self.replicas.term,
        )
        response.uptime.CopyFrom(duration(now_s - mesh.started_s))
        return response

    def _replica_state(self, link: ReplicaLink, now_s: float) -> coordinator_pb2.StageState:
        state = self.mesh.replica_state(link, now_s)
        state.kv_blocks_used = self.num_kv_blocks_used(link)
        state.sequences = self.num_sequences(link)
        if link.incarnation is not None:
            state.resting = self.scheduler.is_resting(link.incarnation.replica_id)
        return state

    def num_kv_blocks_used(self, link: ReplicaLink) -> int:
        """KV blocks that sequences hold on a replica."""
        if link.incarnation is None:
            return 0
        return self.scheduler.kv_blocks_used(link.incarnation.replica_id)

    def num_sequences(self, link: ReplicaLink) -> int:
        """Sequences that hold blocks on a replica."""
        if link.incarnation is None:
            return 0
        return self.scheduler.num_sequences_on(link.incarnation.replica_id)
