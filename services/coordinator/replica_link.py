"""Keeps the Control stream to one replica open.

One *incarnation* lasts from opening the replica until its stream breaks; the next one has a higher
epoch, and an id of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
from penstock.v1 import stage_pb2

from core.errors import PenstockError, Unavailable
from services.common.cancellation import in_own_task
from services.common.channels import open_channel
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.stage_stream import StageStream

_LOG = logging.getLogger(__name__)
_FIRST_BACKOFF_S = 0.05
_MOST_BACKOFF_S = 2.0


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


class ReplicaLink:
    """Dials, opens and watches one replica; see `run`."""

    def __init__(
        self,
        place: Place,
        *,
        settings: CoordinatorSettings,
        listener: ReplicaListener,
        dial: Callable[[str], grpc.aio.Channel] = open_channel,
    ) -> None:
        self.place = place
        self.incarnation: Incarnation | None = None
        self.ready: stage_pb2.StageReady | None = None  # what it last said, kept when it is gone
        self.problem = "starting"
        self.is_draining = False
        self._settings = settings
        self._listener = listener
        self._dial = dial
        self._epoch = 0
        self._dropped: asyncio.Future[str] | None = None

    def drop(self, reason: str) -> None:
        """Ends the incarnation."""
        if self._dropped is not None and not self._dropped.done():
            self._dropped.set_result(f"{self.place.name}: {reason}")

    async def run(self) -> None:
        """Opens the replica again and again until cancelled."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            reason = await in_own_task(self._run_once())
            incarnation, self.incarnation = self.incarnation, None
            if incarnation is not None:
                backoff_s = _FIRST_BACKOFF_S
            self.problem = reason
            _LOG.warning("replica lost", extra={"epoch": self._epoch, "reason": reason})
            self._listener.on_lost(self, incarnation)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MOST_BACKOFF_S)

    async def _run_once(self) -> str:
        """One incarnation; returns why it ended, or did not come about."""
        # A restarted coordinator must exceed the epochs of the one before it.
        self._epoch = max(self._epoch + 1, time.time_ns() // 1_000_000)
        self._dropped = asyncio.get_running_loop().create_future()
        reason = ""
        # A connection of its own: that of the last incarnation may be dead, and not know it yet.
        async with self._dial(self.place.address) as channel:
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
                    await self._open(stream)
            except* PenstockError as errors:
                reason = str(errors.exceptions[0])
        assert reason, "streams end by raising"
        return reason

    def _order(self) -> stage_pb2.OpenPipeline:
        return stage_pb2.OpenPipeline(
            epoch=self._epoch,
            stage_index=self.place.stage_index,
            num_stages=self.place.num_stages,
            num_slots=self._settings.max_sequences,
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

    async def _watch(self, dropped: asyncio.Future[str]) -> None:
        raise Unavailable(await dropped)

    def _on_message(self, message: stage_pb2.ControlResponse) -> None:
        if self.incarnation is not None:
            self._listener.on_message(self.incarnation, message)
