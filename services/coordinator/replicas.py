"""All replicas of the mesh, and the links between them: who is open, fits, and is connected.

The scheduler hears of replicas once there is one of each stage and they fit together: what these
say describes the model for the life of the coordinator. Until then any of them may be the wrong
one, to be replaced.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Protocol

from penstock.v1 import stage_pb2

from core.errors import (
    Exhausted,
    InvalidInput,
    NotFound,
    ProtocolViolation,
    Superseded,
    shown,
)
from core.pipeline.events import (
    Event,
    LinkLost,
    LinkReady,
    PipelineKnown,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    WeightsChosen,
)
from services.common.credentials import Credentials
from services.coordinator.fit import Manifest, check_fit, pipeline_facts, replica_facts
from services.coordinator.neighbour_links import NeighbourLinks
from services.coordinator.replica_link import Incarnation, Place, ReplicaLink
from services.coordinator.settings import CoordinatorSettings

# Of one stage. Each is dialled again and again while nobody answers.
MOST_REPLICAS = 64
_LONGEST_ADDRESS = 256


class MeshListener(Protocol):
    """Who is told what happens to the mesh."""

    def post(self, event: Event) -> None:
        """Something for the scheduler."""

    def on_sampled(self, message: stage_pb2.SampledTokens) -> None:
        """A micro-batch has left the last replica of its path."""

    def on_report(self, replica: Incarnation, report: stage_pb2.StageReport) -> None:
        """A replica has reported its times."""

    def on_mesh_changed(self) -> None:
        """What people and gateways are told of replicas has changed."""

    def on_superseded(self, error: Superseded) -> None:
        """Another coordinator has taken the stages over."""


class Replicas:
    """Opens them all and keeps them open; see `run`."""

    def __init__(
        self,
        settings: CoordinatorSettings,
        listener: MeshListener,
        *,
        credentials: Credentials | None = None,
    ) -> None:
        self.links: list[ReplicaLink] = []  # by stage, then by number
        self.neighbours = NeighbourLinks(self)
        self._settings = settings
        self._listener = listener
        self._credentials = credentials
        self._ids = itertools.count(1)
        self._open: dict[int, Incarnation] = {}
        self._model: Manifest | None = None  # once the scheduler knows it
        self._term = 0
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[ReplicaLink, asyncio.Task[None]] = {}
        for stage_index, addresses in enumerate(settings.stages):
            for address in addresses:
                self._insert(stage_index, address, is_spare=address in settings.spares)

    async def run(self) -> None:
        """Takes the stages over, and keeps all replicas open, those that are added later too, until
        cancelled."""
        self._term = time.time_ns() // 1_000_000
        async with asyncio.TaskGroup() as self._group:
            for link in self.links:
                self._start(link)
            await asyncio.Event().wait()  # also where every replica is drained away

    # --- orders

    def send(self, replica_id: int, request: stage_pb2.ControlRequest) -> None:
        """Sends an order to a replica; orders to one that is gone are dropped."""
        replica = self._open.get(replica_id)
        if replica is not None:
            replica.send(request)

    def drop(self, replica_id: int, reason: str) -> None:
        """Ends an incarnation, because it makes no progress; another one is tried."""
        replica = self._open.get(replica_id)
        if replica is not None:
            replica.drop(reason)

    # --- what there is to see

    @property
    def num_stages(self) -> int:
        return len(self._settings.stages)

    @property
    def manifest(self) -> stage_pb2.StageReady | None:
        """What the replicas say of their model; None until one is open."""
        if self._model is not None:
            return self._model.ready
        return next((replica.ready for replica in self._open.values()), None)

    def is_stage_ready(self, stage_index: int) -> bool:
        """Whether a replica of the stage is open, and connected with both neighbouring stages as
        far as these are open."""
        return any(map(self.is_connected, self._open_at(stage_index)))

    def is_connected(self, replica: Incarnation) -> bool:
        """Whether activations can reach it and leave it."""
        before = self._open_at(replica.place.stage_index - 1)
        behind = self._open_at(replica.place.stage_index + 1)
        connects = self.neighbours.connects
        return (not before or any(connects(other, replica) for other in before)) and (
            not behind or any(connects(replica, other) for other in behind)
        )

    def _open_at(self, stage_index: int) -> list[Incarnation]:
        return [r for r in self._open.values() if r.place.stage_index == stage_index]

    def by_address(self, address: str) -> ReplicaLink:
        """Raises NotFound, naming those there are."""
        for link in self.links:
            if link.place.address == address:
                return link
        known = ", ".join(link.place.address for link in self.links)
        raise NotFound(
            f"no replica listens at {shown(address)}; there are {known}", field="address"
        )

    # --- administration

    def add(self, stage_index: int, address: str, *, is_spare: bool) -> ReplicaLink:
        """Takes a replica into the mesh; raises InvalidInput for a stage that does not exist or an
        address that is none or taken, and Exhausted."""
        if stage_index >= self.num_stages:
            raise InvalidInput("stage_index", stage_index, f"below {self.num_stages}")
        _check_address(address)
        if any(link.place.address == address for link in self.links):
            raise InvalidInput("address", address, "host:port of a replica that is not in use")
        if sum(link.place.stage_index == stage_index for link in self.links) >= MOST_REPLICAS:
            raise Exhausted(f"stage {stage_index} has {MOST_REPLICAS} replicas already")
        link = self._insert(stage_index, address, is_spare=is_spare)
        if self._group is not None:
            self._start(link)
        self._listener.on_mesh_changed()
        return link

    def drain(self, link: ReplicaLink, *, moves: bool) -> None:
        """Gives a replica no new sequences. `moves`: those that it has leave it."""
        link.is_draining = True
        if link.incarnation is not None:
            replica_id = link.incarnation.replica_id
            self._listener.post(ReplicaDraining(replica_id=replica_id, moves=moves))
        self._listener.on_mesh_changed()

    def remove(self, link: ReplicaLink) -> None:
        """Ends a replica's stream for good and forgets it. Idempotent."""
        if link not in self.links:
            return
        self.links.remove(link)
        if link in self._tasks:
            self._tasks.pop(link).cancel()
        if link.incarnation is not None:
            self._forget(link.incarnation, reason="it has been drained")
            link.incarnation = None
        self._listener.on_mesh_changed()

    def choose_weights(self, stage_index: int, weights_digest: str) -> None:
        """Has new sequences take replicas with these weights; raises NotFound where none has."""
        known = {
            r.ready.weights_digest
            for r in self._open.values()
            if r.place.stage_index == stage_index
        }
        if weights_digest not in known:
            raise NotFound(
                f"no open replica of stage {stage_index} has weights {shown(weights_digest)}; "
                f"there are {', '.join(sorted(known)) or 'none'}",
                field="weights_digest",
            )
        self._listener.post(WeightsChosen(stage_index=stage_index, weights=weights_digest))

    # --- replicas (ReplicaListener)

    def admit(self, link: ReplicaLink, ready: stage_pb2.StageReady) -> int:
        newcomer = Manifest(link.place.name, link.place.stage_index, ready)
        others = [_manifest(replica) for replica in self._open.values()]
        check_fit(newcomer, others, num_stages=self.num_stages, model=self._model)
        return next(self._ids)

    def on_open(self, incarnation: Incarnation) -> None:
        self._open[incarnation.replica_id] = incarnation
        if self._model is not None:
            self._introduce(incarnation)
        elif len({replica.place.stage_index for replica in self._open.values()}) == self.num_stages:
            self._introduce_all()
        self._listener.on_mesh_changed()

    def on_message(self, incarnation: Incarnation, message: stage_pb2.ControlResponse) -> None:
        match message.WhichOneof("event"):
            case "sampled":
                self._listener.on_sampled(message.sampled)
            case "report":
                self._listener.on_report(incarnation, message.report)
            case "link":
                self.neighbours.on_state(incarnation, message.link)
            case other:
                name = incarnation.place.name
                raise ProtocolViolation(f"{name} sent a message of kind {other}")

    def on_lost(self, link: ReplicaLink, incarnation: Incarnation | None) -> None:
        if incarnation is not None:
            self._forget(incarnation, reason=link.problem)
        if link.is_draining:
            self.remove(link)  # there is nothing left to wait for
        self._listener.on_mesh_changed()

    def on_superseded(self, error: Superseded) -> None:
        self._listener.on_superseded(error)

    # --- links between them (LinkListener)

    def on_link_ready(self, upstream: Incarnation, downstream: Incarnation) -> None:
        ids = {"upstream_id": upstream.replica_id, "downstream_id": downstream.replica_id}
        self._listener.post(LinkReady(**ids))
        self._listener.on_mesh_changed()

    def on_link_lost(self, upstream: Incarnation, downstream: Incarnation, reason: str) -> None:
        ids = {"upstream_id": upstream.replica_id, "downstream_id": downstream.replica_id}
        self._listener.post(LinkLost(**ids, reason=reason))
        self._listener.on_mesh_changed()

    # --- the beginning and the end of an incarnation

    def _introduce_all(self) -> None:
        """There is a replica of each stage: begins the life of the pipeline."""
        self._model = _manifest(next(iter(self._open.values())))
        facts = pipeline_facts(
            self._model.ready,
            num_stages=self.num_stages,
            num_slots=self._settings.max_sequences,
        )
        self._listener.post(PipelineKnown(facts=facts))
        for incarnation in list(self._open.values()):
            self._introduce(incarnation)

    def _introduce(self, incarnation: Incarnation) -> None:
        place = incarnation.place
        self._listener.post(
            ReplicaReady(
                replica_id=incarnation.replica_id,
                stage_index=place.stage_index,
                facts=replica_facts(incarnation.ready, is_spare=place.is_spare),
            )
        )
        self.neighbours.add(incarnation)

    def _forget(self, incarnation: Incarnation, *, reason: str) -> None:
        del self._open[incarnation.replica_id]
        self.neighbours.remove(incarnation)
        if self._model is not None:
            replica_id = incarnation.replica_id
            self._listener.post(ReplicaLost(replica_id=replica_id, reason=reason))

    def _insert(self, stage_index: int, address: str, *, is_spare: bool) -> ReplicaLink:
        taken = {x.place.number for x in self.links if x.place.stage_index == stage_index}
        number = next(n for n in itertools.count() if n not in taken)
        place = Place(stage_index=stage_index, number=number, address=address, is_spare=is_spare)
        link = ReplicaLink(
            place, settings=self._settings, listener=self, credentials=self._credentials
        )
        self.links.append(link)
        self.links.sort(key=lambda link: (link.place.stage_index, link.place.number))
        return link

    def _start(self, link: ReplicaLink) -> None:
        assert self._group is not None, "replicas are opened while they are kept open"
        self._tasks[link] = self._group.create_task(link.run(term=self._term))


def _manifest(replica: Incarnation) -> Manifest:
    return Manifest(replica.place.name, replica.place.stage_index, replica.ready)


def _check_address(address: str) -> None:
    """Raises InvalidInput for what gRPC would take for something else than host:port."""
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) <= 65535
    if not (is_port and host and host.isprintable() and len(address) <= _LONGEST_ADDRESS):
        raise InvalidInput("address", address, "host:port")
