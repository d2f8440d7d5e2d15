"""The one stream to the coordinator, over which all requests of this gateway travel.

Submissions and cancellations of one turn of the event loop go out in one message. When the
stream breaks, the next coordinator is dialled; `open_requests.py` has what goes on there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

import grpc
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from core.errors import PenstockError, Unavailable
from services.common.cancellation import in_own_task
from services.common.channels import open_channel
from services.common.credentials import Credentials
from services.common.identity import COORDINATOR
from services.common.shortcut import enter
from services.gateway.news_shortcut import NewsShortcut
from services.gateway.open_requests import OpenRequests

_LOG = logging.getLogger(__name__)
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.1, 0.5
# From dialling to the first message, which a coordinator sends as soon as it is called.
_FIRST_MESSAGE_TIMEOUT_S = 3.0
# A coordinator sends something twice a second; one that stays silent for so long is lost. It is
# listened for several times, and seconds are not counted: when it was this process that stood
# still, what was sent meanwhile is there at the first of them.
_SILENCE_S, _LISTENINGS = 2.0, 4
# The coordinator batches news of many requests into one message.
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class CoordinatorLink:
    """Keeps a Connect stream open for as long as `run` runs."""

    def __init__(
        self,
        addresses: Sequence[str],
        requests: OpenRequests,
        *,
        on_mesh: Callable[[coordinator_pb2.MeshState | None], Awaitable[None]],
        credentials: Credentials | None = None,
    ) -> None:
        """`addresses` are dialled in turn: when one coordinator is lost, the next one. One that
        waits is left to wait while there may be another one that serves.

        `on_mesh` is awaited with every new state of the mesh, and with None when it is lost.
        """
        self._addresses = addresses
        self._requests = requests
        self._on_mesh = on_mesh
        self._credentials = credentials
        self._num_read = 0
        self._last_reasons = ""  # why the last try ended
        self._mesh: coordinator_pb2.MeshState | None = None  # the last state; None: no stream

    async def run(self) -> None:
        """Connects, and connects again, until cancelled; then open requests fail."""
        backoff_s = _FIRST_BACKOFF_S
        num_tried = 0  # since one served, that one included
        try:
            for address in itertools.cycle(self._addresses):
                is_last = num_tried + 1 >= len(self._addresses)
                was_connected = await self._connect(address, takes_over=is_last)
                num_tried = 1 if was_connected else num_tried + 1
                longer_s = min(_LAST_BACKOFF_S, 2 * backoff_s)
                backoff_s = _FIRST_BACKOFF_S if was_connected else longer_s
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
        finally:
            self._requests.give_up()

    async def _connect(self, address: str, *, takes_over: bool) -> bool:
        """Serves one stream to its end; whether there was one. `takes_over`: where the coordinator
        waits, it has to serve, since no other one does."""
        try:
            await in_own_task(self._serve_stream(address, takes_over=takes_over))
        except* (grpc.RpcError, PenstockError, TimeoutError) as group:
            reasons = "; ".join(_reason(error) for error in group.exceptions)
            # Once, and not at every try: it may never have been there, for its certificate say.
            is_known = self._mesh is None and reasons == self._last_reasons
            self._last_reasons = reasons
            level = logging.DEBUG if is_known else logging.WARNING
            _LOG.log(level, "coordinator lost", extra={"address": address, "why": reasons})
        finally:
            was_connected = self._mesh is not None
            if was_connected:
                await self._drop_stream()
        return was_connected

    async def _serve_stream(self, address: str, *, takes_over: bool) -> None:
        # A channel of its own for each try: none waits for the backoff of the one before.
        async with open_channel(
            address,
            credentials=self._credentials,
            role=COORDINATOR,
            max_message_bytes=_MAX_MESSAGE_BYTES,
        ) as channel:
            # No deadline: the stream lives as long as both ends, and is heard of.
            call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Connect()
            shortcut = None
            try:
                async with asyncio.timeout(_FIRST_MESSAGE_TIMEOUT_S):
                    if takes_over:
                        await _write(call, coordinator_pb2.ConnectRequest(take_over=True))
                    first = await self._read(call, may_wait=takes_over)
                    connection = enter(first.shortcut, first.shortcut_token)
                    if connection is not None:
                        shortcut = NewsShortcut(connection, self._requests.deliver)
                        await shortcut.greeting()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._write_all(call))
                    tasks.create_task(self._read_all(call))
                    tasks.create_task(self._listen_for_silence())
                    if shortcut is not None:
                        tasks.create_task(shortcut.watch())
            finally:
                call.cancel()
                if shortcut is not None:
                    shortcut.close()

    async def _read_all(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            await self._read(call)

    async def _read(
        self, call: grpc.aio.StreamStreamCall, *, may_wait: bool = True
    ) -> coordinator_pb2.ConnectResponse:
        response = await call.read()
        if not isinstance(response, coordinator_pb2.ConnectResponse):
            raise Unavailable("the coordinator ended the stream")
        self._num_read += 1
        if response.HasField("mesh"):
            if response.mesh.waiting and not may_wait:
                raise Unavailable("the coordinator waits for others to fail")
            await self._take_mesh(response.mesh)
        self._requests.deliver(response)
        return response

    async def _listen_for_silence(self) -> None:
        num_silent = 0
        while num_silent < _LISTENINGS:
            num_heard = self._num_read
            await asyncio.sleep(_SILENCE_S / _LISTENINGS)
            num_silent = num_silent + 1 if num_heard == self._num_read else 0
        raise Unavailable(f"the coordinator was silent for {_SILENCE_S:.0f} s")

    async def _take_mesh(self, mesh: coordinator_pb2.MeshState) -> None:
        self._mesh = mesh
        if mesh.model.ready:
            self._requests.resume()
        self._requests.accept()
        await self._on_mesh(mesh)

    async def _write_all(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            await self._requests.has_news.wait()
            await _write(call, self._requests.next_message())

    async def _drop_stream(self) -> None:
        assert self._mesh is not None
        self._requests.lose(self._mesh.eos_token_ids)
        self._mesh = None
        await self._on_mesh(None)


async def _write(call: grpc.aio.StreamStreamCall, message: coordinator_pb2.ConnectRequest) -> None:
    try:
        await call.write(message)
    except asyncio.InvalidStateError:  # it ended between two turns
        raise Unavailable("the coordinator ended the stream") from None


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
