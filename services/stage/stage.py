"""The stage of this process: its model, and the session it is in, if any.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from penstock.v1 import stage_pb2

from core.errors import ProtocolViolation, Unavailable
from services.common.channels import Dial, open_channel
from services.common.health import HealthService
from services.common.telemetry import Telemetry
from services.stage.metrics import register_metrics
from services.stage.model import LoadedModel
from services.stage.session import OPEN_TIMEOUT_S, Session
from services.stage.timings import Totals
from services.stage.worker import Worker

_LOG = logging.getLogger(__name__)


class Stage:
    """Opens and ends sessions."""

    def __init__(
        self,
        worker: Worker[LoadedModel],
        *,
        health: HealthService,
        telemetry: Telemetry,
        initial_credits: int | None = None,
        offers_shortcuts: bool = True,
        dial: Dial = open_channel,
    ) -> None:
        """`dial` is for replicas of the next stage."""
        self._worker = worker
        self._offers_shortcuts = offers_shortcuts
        self._dial = dial
        self._health = health
        self._telemetry = telemetry
        self._initial_credits = initial_credits
        self._totals = Totals()
        self._model: LoadedModel | None = None
        self._session: Session | None = None
        self._last_epoch = -1
        self._stage_index: int | None = None
        self._changed = asyncio.Event()
        self._closed = False

    async def set_model(self, model: LoadedModel) -> None:
        """Takes the model once it is loaded; those who wait for it go on."""
        self._model = model
        register_metrics(
            self._telemetry,
            manifest=model.manifest,
            totals=self._totals,
            stage_index=lambda: self._stage_index,
            kv_blocks_used=lambda: 0 if self._session is None else self._session.kv_blocks_used,
        )
        await self._health.set("", serving=True)
        self._tell()

    async def open(self, order: stage_pb2.OpenPipeline) -> Session:
        """Begins a session and ends the one before it; waits for the model.

        Raises ProtocolViolation when the order does not fit the model or its epoch is not
        greater than the last one.
        """
        model = await self._loaded()
        if order.epoch <= self._last_epoch:
            raise ProtocolViolation(
                f"epoch {order.epoch} has begun already; the last one is {self._last_epoch}"
            )
        session = Session(
            order,
            model=model,
            worker=self._worker,
            totals=self._totals,
            telemetry=self._telemetry,
            initial_credits=self._initial_credits,
            offers_shortcuts=self._offers_shortcuts,
            dial=self._dial,
        )
        if self._session is not None:
            self._session.close(Unavailable("a newer epoch took this stage over"))
        self._session, self._last_epoch = session, order.epoch
        self._stage_index = order.stage_index
        facts = {"epoch": order.epoch, "stage": order.stage_index, "stages": order.num_stages}
        _LOG.info("pipeline opened", extra=facts)
        self._tell()
        return session

    async def say_serving(self, session: Session) -> None:
        """Makes the stage known to health checks by its place in the pipeline."""
        model = await self._loaded()
        await self._health.set(f"{model.manifest.model}/stage/{session.stage_index}", serving=True)

    def leave(self, session: Session) -> None:
        """Ends a session, if nobody has yet."""
        session.close()
        if self._session is session:
            self._session = None
            _LOG.info("pipeline left", extra={"epoch": session.epoch})

    async def session_of(self, epoch: int) -> Session:
        """Returns the session of `epoch`, waiting for it to begin.

        Upstream may hear of a new epoch first. Raises ProtocolViolation when it is over,
        Unavailable when it does not begin in time.
        """
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._wait_until(lambda: self._last_epoch >= epoch)
        except TimeoutError as error:
            raise Unavailable(f"epoch {epoch} has not begun here") from error
        session = self._session
        if session is None or session.epoch != epoch:
            raise ProtocolViolation(f"epoch {epoch} is not open; the last was {self._last_epoch}")
        return session

    async def close(self) -> None:
        """Ends the session and everybody's waiting: the process is about to stop."""
        self._closed = True
        await self._health.stop_serving()
        if self._session is not None:
            self._session.close(Unavailable("the stage is shutting down"))
        self._tell()

    async def _loaded(self) -> LoadedModel:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._wait_until(lambda: self._model is not None)
        except TimeoutError as error:
            raise Unavailable("the model is still being loaded") from error
        if self._closed or self._model is None:
            raise Unavailable("the stage is shutting down")
        return self._model

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not (self._closed or condition()):
            await self._changed.wait()

    def _tell(self) -> None:
        """Wakes all who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
