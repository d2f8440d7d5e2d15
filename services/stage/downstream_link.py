"""A stream that carries activations to a replica of the next stage, and its credits back.

Frames are numbered from 0 along the link. The replica grants credits in frames; without credit
the frames wait here, and the compute thread holds back when too many do. When the link breaks,
whatever the reason, the session is told and goes on: what waits is dropped, and the coordinator
decides what comes next.

Where the replica offers a shortcut and is on this host, all frames travel over that, sent by
the compute thread itself as long as there is credit.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc

from core.errors import ProtocolViolation, Unavailable
from services.common.channels import Dial
from services.common.shortcut import Shortcut, enter
from services.common.statuses import error_from_rpc
from services.stage.job import Outlet

# A replica is dialled when it is open already: it answers at once, or is gone.
STAND_TIMEOUT_S = 10.0


def _refuse(message: bytes) -> None:
    raise ProtocolViolation(f"{len(message)} bytes came up a link that only goes down")


class LinkListener(Protocol):
    """Hears what happens to a link, on the event loop."""

    def on_stands(self, link: Outlet) -> None:
        """The replica has granted its first credits."""

    def on_sent(self, link: Outlet, micro_batch_id: int, duration_ns: int, *, last: bool) -> None:
        """A frame was handed to the socket, `duration_ns` after it left the compute thread.

        Whoever hears of it counts it.
        """

    def on_broken(self, link: Outlet, error: Exception) -> None:
        """The link is of no more use, or never was."""


class _Waiting(NamedTuple):
    request: stage_pb2.ActivateRequest
    made_ns: int
    last: bool


class DownstreamLink:
    """Sends frames to one replica: an `Outlet`, from its dialling to its end.

    Belongs to the event loop's thread, but for `num_emitted` and `send_now`, which are the compute
    thread's.
    """

    def __init__(
        self,
        listener: LinkListener,
        order: stage_pb2.OpenDownstream,
        *,
        max_unsent_frames: int,
        dial: Dial,
    ) -> None:
        self.link_id = order.link_id
        self.num_emitted = 0
        self.num_sent = 0
        self.is_broken = False
        self._listener = listener
        self._order = order
        self._dial = dial
        self._max_unsent_frames = max_unsent_frames
        self._waiting: deque[_Waiting] = deque()
        self._credits = 0
        self._lock = threading.Lock()  # over frames and credits
        self._shortcut: Shortcut | None = None
        self._progress = asyncio.Event()  # frames or credits have come
        self._task = asyncio.create_task(self._run())

    @property
    def has_room(self) -> bool:
        return self.is_broken or self.num_emitted - self.num_sent < self._max_unsent_frames

    def send(self, requests: Sequence[stage_pb2.ActivateRequest], *, made_ns: int) -> None:
        """Sends the frames of a micro-batch after those before them, as credits allow."""
        with self._lock:
            self._queue(requests, made_ns=made_ns)
        self._progress.set()

    def send_now(self, requests: Sequence[stage_pb2.ActivateRequest]) -> int | None:
        """Sends frames over the shortcut, as credits allow; the others follow by themselves.

        Returns how many have left, of which the listener does not hear; None, and does nothing,
        where there is no shortcut.
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
        if self.is_broken:
            return
        for request in requests:
            self._waiting.append(_Waiting(request, made_ns, last=request is requests[-1]))

    def close(self) -> None:
        """Ends the link; the listener hears nothing more."""
        with self._lock:
            self.is_broken = True
            self._waiting.clear()
        self._task.cancel()
        if self._shortcut is not None:
            self._shortcut.close()

    async def _run(self) -> None:
        try:
            async with self._dial(self._order.address) as channel:
                await self._converse(channel)
        except grpc.aio.AioRpcError as error:
            reason = error_from_rpc(error)
            self._break(Unavailable(f"the link to {self._order.address}: {reason}"))
        except Exception as error:  # the boundary of the task: the link ends with it
            self._break(error)

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        call = stub.Activate()
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
        raise Unavailable(f"{self._order.address} ended the link")

    async def _take_credits(self, call: Any) -> None:
        try:
            async with asyncio.timeout(STAND_TIMEOUT_S):
                response = await call.read()
        except TimeoutError as error:
            raise Unavailable(
                f"{self._order.address} granted no credit in {STAND_TIMEOUT_S:g} s"
            ) from error
        if response is not grpc.aio.EOF:
            self._take_shortcut(response)
            self._listener.on_stands(self)
        while response is not grpc.aio.EOF:
            with self._lock:
                self._credits += response.credits
            self._progress.set()
            response = await call.read()

    async def _send_frames(self, call: Any) -> None:
        opening = stage_pb2.OpenLink(epoch=self._order.epoch, link_id=self.link_id)
        await call.write(stage_pb2.ActivateRequest(open=opening))
        while True:
            while (waiting := self._take_next()) is not None:
                if self._shortcut is None:
                    await call.write(waiting.request)
                self._listener.on_sent(
                    self,
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

    def _take_shortcut(self, response: stage_pb2.ActivateResponse) -> None:
        connection = enter(response.shortcut, response.shortcut_token)
        if connection is not None:
            self._shortcut = Shortcut(connection, on_message=_refuse, on_end=self._break)

    def _break(self, error: Exception) -> None:
        if not self.is_broken:
            self.close()
            self._listener.on_broken(self, error)
