"""One Control stream to a replica of a stage, seen from the coordinator."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc

from core.errors import PenstockError, ProtocolViolation, Superseded, Unavailable
from services.common.shortcut import Shortcut, enter, parse
from services.common.statuses import error_from_rpc

# Orders that a stage has not yet taken from us. The scheduler keeps a few micro-batches in
# flight, so that a queue this long means a stage that no longer reads.
_MAX_QUEUED = 1024
# A stage that says nothing so many times in a row is lost; it is asked when it has not spoken by
# itself. Times are counted, and not seconds: when it was we who stood still, what it has said is
# there at the first of them.
_PULSES = 4
_ASK_FOR_REPORT = stage_pb2.ControlRequest(report=stage_pb2.ReportRequest())


class StageStream:
    """Opened for one incarnation of a replica; ends by raising from `run`."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        name: str,
        on_message: Callable[[stage_pb2.ControlResponse], None],
        pulse_timeout_s: float,
    ) -> None:
        """`name` is for messages to people. `on_message` hears everything but StageReady."""
        self.ready: asyncio.Future[stage_pb2.StageReady] = (
            asyncio.get_running_loop().create_future()
        )
        self._name = name
        self._stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        self._on_message = on_message
        self._pulse_timeout_s = pulse_timeout_s
        self._has_spoken = False
        self._queue: deque[stage_pb2.ControlRequest] = deque()
        self._wake = asyncio.Event()
        self._shortcut: Shortcut | None = None
        self._shortcut_ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, request: stage_pb2.ControlRequest) -> None:
        """Sends an order, over the shortcut at once; orders are performed in this order.

        Raises Unavailable when the stage has not read for a long time.
        """
        if self._shortcut is not None:
            self._shortcut.send(request.SerializeToString())
            return
        if len(self._queue) >= _MAX_QUEUED:
            raise Unavailable(f"{self._name} does not take orders")
        self._queue.append(request)
        self._wake.set()

    async def run(self, order: stage_pb2.OpenPipeline) -> None:
        """Opens the stage and carries messages both ways until the stream breaks.

        Never returns: raises Superseded when another coordinator has the stage, else Unavailable
        with what it answered.
        """
        call = self._stub.Control(wait_for_ready=True)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(call, order))
                group.create_task(self._read(call))
                group.create_task(self._feel_pulse())
                group.create_task(self._watch_shortcut())
        except* PenstockError as errors:
            raise errors.exceptions[0] from None
        finally:
            call.cancel()
            if self._shortcut is not None:
                self._shortcut.close()

    async def _write(self, call: Any, order: stage_pb2.OpenPipeline) -> None:
        try:
            await call.write(stage_pb2.ControlRequest(open=order))
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._queue:
                    await call.write(self._queue.popleft())
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The reader sees the status that ended the stream, and says so.
            await asyncio.Event().wait()

    async def _read(self, call: Any) -> None:
        try:
            async for response in call:
                self._has_spoken = True
                if response.WhichOneof("event") == "ready":
                    self._on_ready(response.ready)
                else:
                    self._on_message(response)
        except grpc.RpcError as error:
            reason = error_from_rpc(error)
            if isinstance(reason, Superseded):
                raise Superseded(f"{self._name}: {reason}") from error
            raise self._lost(str(reason)) from error
        raise self._lost("it ended its stream")

    async def _feel_pulse(self) -> None:
        """Raises Unavailable when an open stage falls silent. Its event loop answers while it
        computes, so that a long step is no silence."""
        await asyncio.shield(self.ready)
        silent = 0
        while silent < _PULSES:
            if not self._has_spoken:
                self.send(_ASK_FOR_REPORT)
            self._has_spoken = False
            await asyncio.sleep(self._pulse_timeout_s / _PULSES)
            silent = 0 if self._has_spoken else silent + 1
        raise self._lost(f"no pulse for {self._pulse_timeout_s:.1f} s")

    def _on_ready(self, message: stage_pb2.StageReady) -> None:
        if self.ready.done():
            raise ProtocolViolation(f"{self._name} became ready twice")
        connection = enter(message.shortcut, message.shortcut_token)
        if connection is not None:
            self._shortcut = Shortcut(
                connection, on_message=self._take, on_end=self._shortcut_ended.set_exception
            )
        self.ready.set_result(message)

    def _take(self, message: bytes) -> None:
        self._has_spoken = True
        self._on_message(parse(stage_pb2.ControlResponse, message))

    async def _watch_shortcut(self) -> None:
        try:
            await self._shortcut_ended
        except Unavailable as error:
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> Unavailable:
        return Unavailable(f"{self._name}: {why}")
