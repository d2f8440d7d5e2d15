"""The stream that carries activations to the next stage, and its credits back.

A link lives as long as its session: one epoch, frames numbered from 0. The next
stage grants credits in frames; without credit the frames wait here, and the compute
thread holds back when too many do. When the link breaks, whatever the reason, the
session is told, and ends with it: the coordinator decides what comes next.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

import grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc

from core.errors import Unavailable
from services.common.channels import open_channel
from services.common.statuses import error_from_rpc


class LinkListener(Protocol):
    """Hears what happens to a link, on the event loop."""

    def on_sent(self, micro_batch_id: int, duration_ns: int, *, last: bool) -> None:
        """A frame was handed to the socket, `duration_ns` after it left the compute thread."""

    def on_broken(self, error: Exception) -> None:
        """The link is of no more use."""


class _Waiting(NamedTuple):
    request: stage_pb2.ActivateRequest
    made_ns: int
    last: bool


class DownstreamLink:
    """Sends frames to the stage at `address`. Belongs to the event loop's thread."""

    def __init__(self, listener: LinkListener, *, address: str, epoch: int) -> None:
        self._listener = listener
        self._address = address
        self._epoch = epoch
        self._waiting: deque[_Waiting] = deque()
        self._credits = 0
        self._progress = asyncio.Event()  # frames or credits have come
        self._stands: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run())

    async def stands(self, *, timeout_s: float) -> None:
        """Returns when the next stage has granted its first credits.

        Raises Unavailable when it does not within `timeout_s` or the link broke.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._stands)
        except TimeoutError as error:
            raise Unavailable(
                f"the next stage at {self._address} did not answer in {timeout_s:g} s"
            ) from error

    def send(self, requests: Sequence[stage_pb2.ActivateRequest], *, made_ns: int) -> None:
        """Sends the frames of a micro-batch after those before them, as credits allow."""
        for request in requests:
            self._waiting.append(_Waiting(request, made_ns, last=request is requests[-1]))
        self._progress.set()

    def close(self) -> None:
        """Ends the link; the listener hears nothing more."""
        self._task.cancel()
        if not self._stands.done():
            self._stands.cancel()

    async def _run(self) -> None:
        try:
            async with open_channel(self._address) as channel:
                await self._converse(channel)
        except grpc.aio.AioRpcError as error:
            reason = error_from_rpc(error)
            self._break(Unavailable(f"the link to the next stage at {self._address}: {reason}"))
        except Exception as error:  # the boundary of the task: the session ends with it
            self._break(error)

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        call = stub.Activate(wait_for_ready=True)
        credits = asyncio.create_task(self._take_credits(call))
        frames = asyncio.create_task(self._send_frames(call))
        try:
            await asyncio.wait((credits, frames), return_when=asyncio.FIRST_COMPLETED)
            # The reader has the stream's status; a failed write only says that it is over.
            await credits
        finally:
            call.cancel()
            credits.cancel()
            frames.cancel()
            await asyncio.gather(credits, frames, return_exceptions=True)
        raise Unavailable(f"the next stage at {self._address} ended the link")

    async def _take_credits(self, call: AsyncIterator[stage_pb2.ActivateResponse]) -> None:
        async for response in call:
            self._credits += response.credits
            self._progress.set()
            if not self._stands.done():
                self._stands.set_result(None)

    async def _send_frames(self, call: Any) -> None:
        await call.write(stage_pb2.ActivateRequest(open=stage_pb2.OpenLink(epoch=self._epoch)))
        while True:
            while self._waiting and self._credits > 0:
                waiting = self._waiting.popleft()
                self._credits -= 1
                await call.write(waiting.request)
                self._listener.on_sent(
                    waiting.request.frame.micro_batch_id,
                    time.perf_counter_ns() - waiting.made_ns,
                    last=waiting.last,
                )
            self._progress.clear()
            await self._progress.wait()

    def _break(self, error: Exception) -> None:
        if not self._stands.done():
            self._stands.set_exception(error)
            self._stands.exception()  # seen: `stands` may have given up already
        self._listener.on_broken(error)
