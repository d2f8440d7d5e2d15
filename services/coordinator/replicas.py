"""All replicas of the mesh, and the links between them: who is open, fits, and is connected.

The scheduler hears of replicas once there is one of each stage and they fit together: what these
say describes the model for the life of the coordinator, and where it is cut until another cut is
chosen. Until then any of them may be the wrong one, to be replaced.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace
from typing import Protocol

from penstock.v1 import stage_pb2

from core.errors import (
    Exhausted,
    InvalidInput,
    NotFound,
    ProtocolViolation,
    Superseded,
    Unavailable,
    shown,
)
from core.pipeline.cut import Cut, Part, find_cut
from core.pipeline.events import (
    CutChosen,
    Event,
    LinkLost,
    LinkReady,
    PipelineKnown,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
)
from services.common.credentials import Credentials
from services.coordinator.fit import Manifest, check_fit, part_of, pipeline_facts, replica_facts
from services.coordinator.neighbour_links import NeighbourLinks, joins_up
from services.coordinator.replica_link import Incarnation, Place, ReplicaLink, places_of
from services.coordinator.roster import Roster, read_roster
from services.coordinator.settings import CoordinatorSettings, check_address

# Of one stage. Each is dialled again and again while nobody answers.
MOST_REPLICAS = 64


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
        self.cut: Cut | None = None  # what new sequences take, once the scheduler knows the model
        self.term = 0  # when it took the stages over, Unix time in ms; 0: it has not
        self._settings = settings
        self._listener = listener
        self._credentials = credentials
        self._ids = itertools.count(1)
        self._open: dict[int, Incarnation] = {}
        self._model: Manifest | None = None  # once the scheduler knows it
        self._has_chosen = False  # an operator, since this coordinator began
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[ReplicaLink, asyncio.Task[None]] = {}
        self._take_roster(settings.roster)

    async def run(self) -> None:
        """Takes the stages over, and keeps all replicas open, those that are added later too, until
        cancelled."""
        if (path := self._settings.stages_file) is not None:
            self._take_roster(read_roster(path))  # replicas may have changed while it waited
        self.term = time.time_ns() // 1_000_000
        async with asyncio.TaskGroup() as self._group:
            for link in self.links:
                self._start(link)
            await asyncio.Event().wait()  # also where every replica is drained away

    def _take_roster(self, roster: Roster) -> None:
        """Knows these replicas, and no others; none of them is open yet."""
        self._roster = roster
        self.links.clear()
        for place in places_of(roster):
            self._insert(place)

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
            replica.link.drop(reason)

    # --- what there is to see

    @property
    def num_stages(self) -> int:
        return len(self._roster.stages if self.cut is None else self.cut.parts)

    @property
    def manifest(self) -> stage_pb2.StageReady | None:
        """What the replicas say of their model; None until one is open."""
        if self._model is not None:
            return self._model.ready
        return next((replica.ready for replica in self._open.values()), None)

    def is_stage_ready(self, stage_index: int) -> bool:
        """Whether a replica of the stage that new sequences take is open, and connected with both
        neighbouring stages as far as these are open."""
        return any(
            self.is_connected(replica)
            for replica in self._open.values()
            if replica.place.stage_index == stage_index
            and (self.cut is None or replica.layers == self.cut.parts[stage_index].layers)
        )

    def is_connected(self, replica: Incarnation) -> bool:
        """Whether activations can reach it and leave it."""
        before = [other for other in self._open.values() if joins_up(other, replica)]
        behind = [other for other in self._open.values() if joins_up(replica, other)]
        connects = self.neighbours.connects
        return (not before or any(connects(other, replica) for other in before)) and (
            not behind or any(connects(replica, other) for other in behind)
        )

    def is_passed_over(self, replica: Incarnation) -> bool:
        """Whether new sequences take other layers or weights."""
        return self.cut is not None and part_of(replica.ready) not in self.cut.parts

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

    def add(
        self, stage_index: int, address: str, *, is_spare: bool, split: str = ""
    ) -> ReplicaLink:
        """Takes a replica into the mesh, as one of another cut where there is a `split`.

        Raises InvalidInput for a stage that does not exist, no cut of the model, or an address that
        is none or taken; Exhausted; Unavailable for another cut before the model is known.
        """
        cut = self.known_cut().at(split) if split else self.cut
        num_stages = self.num_stages if cut is None else len(cut.parts)
        if stage_index >= num_stages:
            raise InvalidInput("stage_index", stage_index, f"below {num_stages}")
        check_address(address)
        if any(link.place.address == address for link in self.links):
            raise InvalidInput("address", address, "host:port of a replica that is not in use")
        if sum(link.place.stage_index == stage_index for link in self.links) >= MOST_REPLICAS:
            raise Exhausted(f"stage {stage_index} has {MOST_REPLICAS} replicas already")
        place = Place(
            stage_index=stage_index,
            num_stages=num_stages,
            number=self._free_number(stage_index),
            address=address,
            is_spare=is_spare,
            layers=None if cut is None else cut.parts[stage_index].layers,
        )
        link = self._insert(place)
        if self._group is not None:
            self._start(link)
        self._listener.on_mesh_changed()
        return link

    def drain(self, link: ReplicaLink, *, moves: bool) -> None:
        """Gives a replica no new sequences. `moves`: those that it has leave it."""
        link.is_draining, link.is_evacuated = True, moves
        if link.incarnation is not None:
            self._tell_draining(link.incarnation)
        self._listener.on_mesh_changed()

    def _tell_draining(self, incarnation: Incarnation) -> None:
        moves = incarnation.link.is_evacuated
        self._listener.post(ReplicaDraining(replica_id=incarnation.replica_id, moves=moves))

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

    def known_cut(self) -> Cut:
        """What new sequences take; raises Unavailable before the model is known."""
        if self.cut is None:
            raise Unavailable("no replica has told yet what the model is")
        return self.cut

    def part_with(self, stage_index: int, weights_digest: str) -> Part:
        """What an open replica of a stage with these weights holds; raises NotFound where none has
        them."""
        parts = {
            replica.ready.weights_digest: part_of(replica.ready)
            for replica in self._open.values()
            if replica.place.stage_index == stage_index
        }
        if weights_digest not in parts:
            raise NotFound(
                f"no open replica of stage {stage_index} has weights {shown(weights_digest)}; "
                f"there are {', '.join(sorted(parts)) or 'none'}",
                field="weights_digest",
            )
        return parts[weights_digest]

    def choose(self, cut: Cut) -> None:
        """Has new sequences take a cut; raises NotFound where no open replica holds a part."""
        held = {part_of(replica.ready) for replica in self._open.values()}
        for part in cut.parts:
            if part not in held:
                layers = "{}:{}".format(*part.layers)
                raise NotFound(f"no open replica holds layers {layers} with the weights chosen")
        self._has_chosen = True
        self._take_cut(cut)
        self._listener.on_mesh_changed()

    def _take_cut(self, cut: Cut) -> None:
        """Replicas of its parts belong to it from now on; others to the cut that they came with."""
        self.cut = cut
        stage_of = {part.layers: index for index, part in enumerate(cut.parts)}
        for link in self.links:
            place = link.place
            if place.layers not in stage_of:
                continue
            stage_index, number = stage_of[place.layers], place.number
            if stage_index != place.stage_index:
                number = self._free_number(stage_index)
            link.place = replace(
                place, stage_index=stage_index, num_stages=len(cut.parts), number=number
            )
        self._sort()
        self._listener.post(CutChosen(cut=cut))

    # --- replicas (ReplicaListener)

    def admit(self, link: ReplicaLink, ready: stage_pb2.StageReady) -> int:
        others = [_manifest(replica) for replica in self._open.values()]
        check_fit(Manifest(link.place, ready), others, model=self._model)
        return next(self._ids)

    def on_open(self, incarnation: Incarnation) -> None:
        self._open[incarnation.replica_id] = incarnation
        if self._model is not None:
            self._introduce(incarnation)
            self._prefer(incarnation)
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
        replicas = list(self._open.values())
        self._model = _manifest(replicas[0])
        ready = self._model.ready
        facts = pipeline_facts(ready, num_slots=self._settings.max_sequences)
        self._listener.post(PipelineKnown(facts=facts))
        for incarnation in replicas:
            self._introduce(incarnation)
        parts = (part_of(replica.ready) for replica in self._latest_first())
        cut = find_cut(parts, num_layers=ready.num_layers)
        assert cut is not None, "replicas of neighbouring stages fit"
        for link in self.links:
            link.place = replace(link.place, layers=cut.parts[link.place.stage_index].layers)
        self._take_cut(cut)

    def _prefer(self, incarnation: Incarnation) -> None:
        """Of the replicas that a coordinator begins with, later ones came with an update: they have
        the weights that were chosen, also where they open later. An operator's choice ends that."""
        is_of_the_beginning = incarnation.place.address in self._roster.addresses
        if self.cut is not None and is_of_the_beginning and not self._has_chosen:
            parts = [part_of(one.ready) for one in self._latest_first() if not one.link.is_draining]
            changed = self.cut.with_first(parts)
            if changed != self.cut:
                self._take_cut(changed)

    def _latest_first(self) -> list[Incarnation]:
        return sorted(self._open.values(), key=lambda replica: -replica.place.number)

    def _introduce(self, incarnation: Incarnation) -> None:
        place = incarnation.place
        self._listener.post(
            ReplicaReady(
                replica_id=incarnation.replica_id,
                facts=replica_facts(incarnation.ready, is_spare=place.is_spare),
            )
        )
        if incarnation.link.is_draining:
            self._tell_draining(incarnation)
        self.neighbours.add(incarnation)

    def _forget(self, incarnation: Incarnation, *, reason: str) -> None:
        del self._open[incarnation.replica_id]
        self.neighbours.remove(incarnation)
        if self._model is not None:
            replica_id = incarnation.replica_id
            self._listener.post(ReplicaLost(replica_id=replica_id, reason=reason))

    def _insert(self, place: Place) -> ReplicaLink:
        link = ReplicaLink(
            place, settings=self._settings, listener=self, credentials=self._credentials
        )
        self.links.append(link)
        self._sort()
        return link

    def _free_number(self, stage_index: int) -> int:
        taken = {x.place.number for x in self.links if x.place.stage_index == stage_index}
        return next(number for number in itertools.count() if number not in taken)

    def _sort(self) -> None:
        self.links.sort(key=lambda link: (link.place.stage_index, link.place.number))

    def _start(self, link: ReplicaLink) -> None:
        assert self._group is not None, "replicas are opened while they are kept open"
        self._tasks[link] = self._group.create_task(link.run(term=self.term))


def _manifest(replica: Incarnation) -> Manifest:
    return Manifest(replica.place, replica.ready)
