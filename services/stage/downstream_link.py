"""The stream that carries activations to the next stage, and its credits back.

A link lives as long as its session: one epoch, frames numbered from 0. The next
stage grants credits in frames; without credit the frames wait here, and the compute
thread holds back when too many do. When the link breaks, whatever the reason, the
session is told, and ends with it: the coordinator decides what comes next.

Where the next stage offers a shortcut and is on this host, all frames travel over that, sent by
the compute thread itself as long as there is credit.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

import grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc

from core.errors import ProtocolViolation, Unavailable
from services.common.channels import open_channel
from services.common.shortcut import Shortcut, enter
from services.common.statuses import error_from_rpc


def _refuse(message: bytes) -> None:
    raise ProtocolViolation(f"{len(message)} bytes came up a link that only goes down")


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
    """Sends frames to the stage at `address`.

    Belongs to the event loop's thread, but for `send_now`, which is the compute thread's.
    """

    def __init__(self, listener: LinkListener, *, address: str, epoch: int) -> None:
        self._listener = listener
        self._address = address
        self._epoch = epoch
        self._waiting: deque[_Waiting] = deque()
        self._credits = 0
        self._lock = threading.Lock()  # over frames and credits
        self._shortcut: Shortcut | None = None
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
        self._queue(requests, made_ns=made_ns)
        self._progress.set()

    def send_now(self, requests: Sequence[stage_pb2.ActivateRequest]) -> int | None:
        """Sends frames over the shortcut, as credits allow; the others follow by themselves.

        Returns how many have left; None, and does nothing, where there is no shortcut. The
        listener hears of the others only.
        """
        shortcut = self._shortcut
        if shortcut is None:
            return None
        with self._lock:
            num_sent = 0 if self._waiting else min(self._credits, len(requests))
            self._credits -= num_sent
            for request in requests[:num_sent]:
                shortcut.send(request.SerializeToString())
            self._queue(requests[num_sent:], made_ns=time.perf_counter_ns())
        return num_sent

    def _queue(self, requests: Sequence[stage_pb2.ActivateRequest], *, made_ns: int) -> None:
        for request in requests:
            self._waiting.append(_Waiting(request, made_ns, last=request is requests[-1]))

    def close(self) -> None:
        """Ends the link; the listener hears nothing more."""
        self._task.cancel()
        if self._shortcut is not None:
            self._shortcut.close()
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
            if not self._stands.done():
                self._take_shortcut(response.shortcut)
                self._stands.set_result(None)
            with self._lock:
                self._credits += response.credits
            self._progress.set()

    async def _send_frames(self, call: Any) -> None:
        await call.write(stage_pb2.ActivateRequest(open=stage_pb2.OpenLink(epoch=self._epoch)))
        while True:
            while (waiting := self._take_next()) is not None:
                if self._shortcut is None:
                    await call.write(waiting.request)
                self._listener.on_sent(
                    waiting.request.frame.micro_batch_id,
                    time.perf_counter_ns() - waiting.made_ns,
                    last=waiting.last,
                )
            self._progress.clear()
            await self._progress.wait()

    def _take_next(self) -> _Waiting | None:
        """The next frame that may leave; with a shortcut it has left, before any later one."""
        with self._lock:
            if not self._waiting or self._credits == 0:
                return None
            self._credits -= 1
            waiting = self._waiting.popleft()
            if self._shortcut is not None:
                self._shortcut.send(waiting.request.SerializeToString())
            return waiting

    def _take_shortcut(self, address: str) -> None:
        connection = enter(address)
        if connection is not None:
            self._shortcut = Shortcut(connection, on_message=_refuse, on_end=self._break)

    def _break(self, error: Exception) -> None:
        if self._shortcut is not None:
            self._shortcut.close()
        if not self._stands.done():
            self._stands.set_exception(error)
            self._stands.exception()  # seen: `stands` may have given up already
        self._listener.on_broken(error)
