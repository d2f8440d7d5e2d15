"""One stage's Control stream, seen from the coordinator."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc

from core.errors import PenstockError, ProtocolViolation, Unavailable
from services.common.shortcut import Shortcut, enter, parse
from services.common.statuses import error_from_rpc

# Orders that a stage has not yet taken from us. The scheduler keeps a few micro-batches in
# flight, so that a queue this long means a stage that no longer reads.
_MAX_QUEUED = 1024


class StageStream:
    """Opened for one incarnation of the pipeline; ends by raising from `run`."""

    def __init__(self, stage_index: int, address: str, channel: grpc.aio.Channel) -> None:
        self.stage_index = stage_index
        self.address = address
        self.ready: asyncio.Future[stage_pb2.StageReady] = (
            asyncio.get_running_loop().create_future()
        )
        self._stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        self._queue: deque[stage_pb2.ControlRequest] = deque()
        self._wake = asyncio.Event()
        self._on_message: Callable[[int, stage_pb2.ControlResponse], None] | None = None
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
            raise Unavailable(f"stage {self.stage_index} ({self.address}) does not take orders")
        self._queue.append(request)
        self._wake.set()

    async def run(
        self,
        order: stage_pb2.OpenPipeline,
        on_message: Callable[[int, stage_pb2.ControlResponse], None],
    ) -> None:
        """Opens the stage and carries messages both ways until the stream breaks.

        Never returns: raises what the stage answered, or Unavailable when it is gone.
        """
        self._on_message = on_message
        call = self._stub.Control(wait_for_ready=True)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(call, order))
                group.create_task(self._read(call, on_message))
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

    async def _read(
        self, call: Any, on_message: Callable[[int, stage_pb2.ControlResponse], None]
    ) -> None:
        try:
            async for response in call:
                if response.WhichOneof("event") == "ready":
                    self._on_ready(response.ready)
                else:
                    on_message(self.stage_index, response)
        except grpc.RpcError as error:
            cause = error_from_rpc(error)
            raise self._lost(str(cause)) from error
        raise self._lost("it ended its stream")

    def _on_ready(self, message: stage_pb2.StageReady) -> None:
        if self.ready.done():
            raise ProtocolViolation(f"stage {self.stage_index} ({self.address}) became ready twice")
        connection = enter(message.shortcut)
        if connection is not None:
            self._shortcut = Shortcut(
                connection, on_message=self._take, on_end=self._shortcut_ended.set_exception
            )
        self.ready.set_result(message)

    def _take(self, message: bytes) -> None:
        assert self._on_message is not None
        self._on_message(self.stage_index, parse(stage_pb2.ControlResponse, message))

    async def _watch_shortcut(self) -> None:
        try:
            await self._shortcut_ended
        except Unavailable as error:
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> StageLost:
        return StageLost(self.stage_index, f"stage {self.stage_index} ({self.address}): {why}")


class StageLost(Unavailable):
    """A stage's stream is gone; says which."""

    def __init__(self, stage_index: int, message: str) -> None:
        self.stage_index = stage_index
        super().__init__(message)
