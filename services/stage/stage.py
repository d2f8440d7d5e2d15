"""The stage of this process: its model, and the session it is in, if any.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from penstock.v1 import stage_pb2

from core.errors import PenstockError, ProtocolViolation, Superseded, Unavailable
from services.common.channels import Dial, open_channel
from services.common.health import HealthService
from services.common.telemetry import Telemetry
from services.stage.metrics import register_metrics
from services.stage.model import LoadedModel
from services.stage.session import OPEN_TIMEOUT_S, Session
from services.stage.timings import Totals
from services.stage.worker import Worker

_LOG = logging.getLogger(__name__)
# Epochs and terms begin at the coordinator's clock. One far ahead of ours, taken, would keep every
# later coordinator out until this process is restarted.
MAX_EPOCH_AHEAD_MS = 600_000
# After the end of a session its last step may still run; policy keeps steps far shorter than this.
# A thread that has hung cannot be ended, only its process.
HANG_LIMIT_S = 5.0


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
        hang_limit_s: float = HANG_LIMIT_S,
    ) -> None:
        """`dial` is for replicas of the next stage; `hang_limit_s`: from a session's opening to
        the end of the last one's last step."""
        self._worker = worker
        self._offers_shortcuts = offers_shortcuts
        self._dial = dial
        self._health = health
        self._telemetry = telemetry
        self._initial_credits = initial_credits
        self._hang_limit_s = hang_limit_s
        self._hung = asyncio.Event()
        self._totals = Totals()
        self._model: LoadedModel | None = None
        self._session: Session | None = None
        self._last_epoch = -1
        self._last_term = 0
        self._stage_index: int | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self._distrusted: Unavailable | None = None

    async def set_model(self, model: LoadedModel) -> None:
        """Takes the model once it is loaded; those who wait for it go on."""
        self._model = model
        register_metrics(
            self._telemetry,
            manifest=model.manifest,
            totals=self._totals,
            watch=model.watch,
            stage_index=lambda: self._stage_index,
            kv_blocks_used=lambda: 0 if self._session is None else self._session.kv_blocks_used,
        )
        await self._health.set("", serving=True)
        self._tell()

    async def open(self, order: stage_pb2.OpenPipeline) -> Session:
        """Begins a session and ends the one before it; waits for the model.

        Raises ProtocolViolation when the order does not fit the model, or its epoch is not
        greater than the last one, or far ahead of the clock, as its term may not be; Superseded
        when its coordinator is not the latest; Unavailable once the weights are distrusted.
        """
        _check_clock("epoch", order.epoch)
        _check_clock("term", order.term)
        model = await self._loaded()
        if self._distrusted is not None:
            raise self._distrusted
        if order.term < self._last_term:
            raise Superseded(f"term {order.term} is over: {self._last_term} has begun")
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
            self._session.close(_successor(order, last_term=self._last_term))
        self._session, self._last_epoch = session, order.epoch
        self._last_term = order.term
        self._stage_index = order.stage_index
        facts = {"epoch": order.epoch, "stage": order.stage_index, "stages": order.num_stages}
        _LOG.info("pipeline opened", extra=facts)
        self._tell()
        return session

    async def begin(self, session: Session) -> None:
        """Has the compute thread begin with a session, and the stage known to health checks by its
        place in the pipeline. Raises Unavailable where the thread hangs."""
        try:
            async with asyncio.timeout(self._hang_limit_s):
                await session.open()
        except TimeoutError:
            self._hung.set()
            raise Unavailable("the stage's compute thread has hung") from None
        model = await self._loaded()
        await self._health.set(f"{model.manifest.model}/stage/{session.stage_index}", serving=True)

    async def watch(self) -> None:
        """Raises Unavailable once the compute thread is known to hang: the process is of no use."""
        await self._hung.wait()
        await self.close()
        raise Unavailable("the compute thread has hung; another process must take its place")

    def leave(self, session: Session) -> None:
        """Ends a session, if nobody has yet."""
        session.close()
        if self._session is session:
            self._session = None
            _LOG.info("pipeline left", extra={"epoch": session.epoch})

    async def session_of(self, epoch: int) -> Session:
        """Returns the session of `epoch`, waiting for it to begin.

        Upstream may hear of a new epoch first. Raises ProtocolViolation when it is over or cannot
        be, Unavailable when it does not begin in time.
        """
        _check_clock("epoch", epoch)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._wait_until(lambda: self._last_epoch >= epoch)
        except TimeoutError as error:
            raise Unavailable(f"epoch {epoch} has not begun here") from error
        session = self._session
        if session is None or session.epoch != epoch:
            raise ProtocolViolation(f"epoch {epoch} is not open; the last was {self._last_epoch}")
        return session

    async def distrust(self, damaged: str) -> None:
        """Serves nobody any more: weights in memory, the array `damaged`, have changed."""
        layers = "" if self._model is None else _layers(self._model)
        message = f"the weights of layers {layers} have changed in memory: {damaged}"
        _LOG.error("weights damaged", extra={"layers": layers, "array": damaged})
        self._distrusted = Unavailable(message, retry_after_s=None)
        await self._health.stop_serving()
        if self._session is not None:
            self._session.close(self._distrusted)

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


def _layers(model: LoadedModel) -> str:
    return f"{model.manifest.first_layer}:{model.manifest.end_layer}"


def _check_clock(name: str, time_ms: int) -> None:
    now_ms = time.time_ns() // 1_000_000
    if time_ms > now_ms + MAX_EPOCH_AHEAD_MS:
        raise ProtocolViolation(
            f"{name} {time_ms} is ahead of this host's clock, {now_ms} ms, by more than "
            f"{MAX_EPOCH_AHEAD_MS} ms: one of the two clocks is wrong"
        )


def _successor(order: stage_pb2.OpenPipeline, *, last_term: int) -> PenstockError:
    """Why a session ends when another one begins."""
    if order.term > last_term:
        return Superseded(f"a coordinator of term {order.term} has taken this stage over")
    return Unavailable("a newer epoch took this stage over")
