"""Keeps the Control stream to one replica open.

One *incarnation* lasts from opening the replica until its stream breaks; the next one has a higher
epoch, and an id of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Protocol

import grpc
from penstock.v1 import stage_pb2

from core.errors import PenstockError, Superseded, Unavailable
from services.common.cancellation import in_own_task
from services.common.channels import open_channel, why_unreachable
from services.common.credentials import Credentials
from services.common.identity import stage_role
from services.coordinator.backoff import Backoff
from services.coordinator.roster import Roster
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.stage_stream import StageStream

_LOG = logging.getLogger(__name__)
# A process that starts listens by then; later, whoever looks shall see why nobody answers.
_SILENCE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a replica stands: in the mesh, and on the network."""

    stage_index: int
    num_stages: int  # of the cut that it belongs to
    number: int  # among all with this stage index, from 0
    address: str
    is_spare: bool = False
    # What it must hold; None: whatever fits beside the others.
    layers: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"stage {self.stage_index} ({self.address})"


def places_of(roster: Roster) -> list[Place]:
    """The places of those that a coordinator begins with."""
    return [
        Place(
            stage_index=stage_index,
            num_stages=len(roster.stages),
            number=number,
            address=address,
            is_spare=address in roster.spares,
        )
        for stage_index, addresses in enumerate(roster.stages)
        for number, address in enumerate(addresses)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Incarnation:
    """A replica that is open. Holds nothing of what earlier incarnations held."""

    replica_id: int
    link: ReplicaLink
    epoch: int
    ready: stage_pb2.StageReady
    stream: StageStream

    @property
    def place(self) -> Place:
        """Where it stands now."""
        return self.link.place

    @property
    def layers(self) -> tuple[int, int]:
        return self.ready.first_layer, self.ready.end_layer

    def send(self, request: stage_pb2.ControlRequest) -> None:
        """Sends an order; a replica that takes none any more is dropped."""
        try:
            self.stream.send(request)
        except Unavailable as error:
            self.link.drop(str(error))


class ReplicaListener(Protocol):
    """Who is told what happens to a replica."""

    def admit(self, link: ReplicaLink, ready: stage_pb2.StageReady) -> int:
        """Returns the id of the new incarnation; raises ProtocolViolation where it does not fit."""

    def on_open(self, incarnation: Incarnation) -> None: ...

    def on_message(self, incarnation: Incarnation, message: stage_pb2.ControlResponse) -> None: ...

    def on_lost(self, link: ReplicaLink, incarnation: Incarnation | None) -> None:
        """The incarnation is over, or did not come about, for `link.problem`."""

    def on_superseded(self, error: Superseded) -> None:
        """Another coordinator has taken the replica over; it is not opened again."""


class ReplicaLink:
    """Dials, opens and watches one replica; see `run`."""

    def __init__(
        self,
        place: Place,
        *,
        settings: CoordinatorSettings,
        listener: ReplicaListener,
        credentials: Credentials | None = None,
    ) -> None:
        self.place = place
        self.incarnation: Incarnation | None = None
        self.ready: stage_pb2.StageReady | None = None  # what it last said, kept when it is gone
        self.problem = "starting"
        self.is_draining = False
        self.is_evacuated = False  # draining, and the sequences that it has leave it
        # The stage that its certificate names, whatever stage of a later cut has its layers; None
        # in a mesh without certificates.
        self.certified_index = None if credentials is None else place.stage_index
        self._settings = settings
        self._listener = listener
        self._credentials = credentials
        self._epoch = self._term = 0
        self._dropped: asyncio.Future[str] | None = None

    def drop(self, reason: str) -> None:
        """Ends the incarnation."""
        if self._dropped is not None and not self._dropped.done():
            self._dropped.set_result(f"{self.place.name}: {reason}")

    async def run(self, *, term: int) -> None:
        """Opens the replica again and again until it is superseded. `term`: the coordinator's."""
        self._term = term
        backoff = Backoff()
        while True:
            error = await in_own_task(self._run_once())
            if isinstance(error, Superseded):
                self._listener.on_superseded(error)
                return
            incarnation, self.incarnation = self.incarnation, None
            if incarnation is not None:
                backoff.reset()
            self.problem = reason = str(error)
            _LOG.warning("replica lost", extra={"epoch": self._epoch, "reason": reason})
            self._listener.on_lost(self, incarnation)
            await asyncio.sleep(backoff.take_s())

    async def _run_once(self) -> PenstockError:
        """One incarnation; returns why it ended, or did not come about."""
        # A restarted coordinator must exceed the epochs of the one before it.
        self._epoch = max(self._epoch + 1, time.time_ns() // 1_000_000)
        self._dropped = asyncio.get_running_loop().create_future()
        error: PenstockError | None = None
        # A connection of its own: that of the last incarnation may be dead, and not know it yet.
        async with self._dial() as channel:
            stream = StageStream(
                channel,
                name=self.place.name,
                on_message=self._on_message,
                pulse_timeout_s=self._settings.pulse_timeout_s,
            )
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(stream.run(self._order()))
                    group.create_task(self._watch(self._dropped))
                    group.create_task(self._explain(channel))
                    await self._open(stream)
            except* PenstockError as errors:
                error = _leaf(errors)
        assert error is not None, "streams end by raising"
        return error

    def _dial(self) -> grpc.aio.Channel:
        role = "" if self.certified_index is None else stage_role(self.certified_index)
        return open_channel(self.place.address, credentials=self._credentials, role=role)

    def _order(self) -> stage_pb2.OpenPipeline:
        return stage_pb2.OpenPipeline(
            epoch=self._epoch,
            stage_index=self.place.stage_index,
            num_stages=self.place.num_stages,
            num_slots=self._settings.max_sequences,
            term=self._term,
        )

    async def _open(self, stream: StageStream) -> None:
        timeout_s = self._settings.open_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                ready = await stream.ready
        except TimeoutError:
            raise Unavailable(f"{self.place.name}: not ready within {timeout_s:.0f} s") from None
        self.ready = ready
        incarnation = Incarnation(
            replica_id=self._listener.admit(self, ready),
            link=self,
            epoch=self._epoch,
            ready=ready,
            stream=stream,
        )
        self.incarnation, self.problem = incarnation, ""
        _LOG.info("replica open", extra={"epoch": self._epoch, "replica": incarnation.replica_id})
        self._listener.on_open(incarnation)

    async def _explain(self, channel: grpc.aio.Channel) -> None:
        """Says why a replica cannot be reached, which its stream waits for in silence."""
        while True:
            await asyncio.sleep(_SILENCE_S)
            if self.incarnation is not None:
                return
            reason = await why_unreachable(channel)
            if reason and self.incarnation is None and reason != self.problem:
                self.problem = reason
                facts = {"replica": self.place.name, "reason": reason}
                _LOG.warning("replica cannot be reached", extra=facts)

    async def _watch(self, dropped: asyncio.Future[str]) -> None:
        raise Unavailable(await dropped)

    def _on_message(self, message: stage_pb2.ControlResponse) -> None:
        if self.incarnation is not None:
            self._listener.on_message(self.incarnation, message)


def _leaf(errors: BaseExceptionGroup[PenstockError]) -> PenstockError:
    """The first of them."""
    error = errors.exceptions[0]
    assert isinstance(error, PenstockError), "tasks of one group, none of which has groups"
    return error
