"""The one stream to the coordinator, over which all requests of this gateway travel.

Submissions and cancellations of one turn of the event loop go out in one message.
When the stream ends, its open requests fail with Unavailable and the link dials
again; what a request needs to be resumed elsewhere (prompt, seed, tokens so far)
is the caller's, so that resumption can be added above this module.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import grpc
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from core.errors import PenstockError, ProtocolViolation, Unavailable
from services.common.cancellation import in_own_task

_LOG = logging.getLogger(__name__)
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.1, 1.0
# A token id takes at most 5 bytes on the wire: keeps a message well below 4 MiB.
_MAX_TOKENS_A_MESSAGE = 256 * 1024


class News(NamedTuple):
    """What has come for a request: tokens with nothing to say of them, then updates."""

    token_ids: list[int]
    updates: list[coordinator_pb2.RequestUpdate]


class OpenRequest:
    """A request on its way. `receive` is for one task at a time.

    What waits to be received needs no bound of its own: a request never has more than its
    `max_tokens` tokens, and its reader takes everything that has come at once.
    """

    __slots__ = ("_error", "_link", "_token_ids", "_updates", "_waiter", "ended", "request_id")

    def __init__(self, link: CoordinatorLink, request_id: int) -> None:
        self.request_id = request_id
        self.ended = False
        self._link = link
        self._error: PenstockError | None = None
        self._token_ids: list[int] = []
        self._updates: list[coordinator_pb2.RequestUpdate] = []
        self._waiter: asyncio.Future[None] | None = None

    async def receive(self) -> News:
        """Waits for news and returns all there is; raises Unavailable when the link broke."""
        while not self._token_ids and not self._updates:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news = News(self._token_ids, self._updates)
        self._token_ids, self._updates = [], []
        return news

    def cancel(self) -> None:
        """Tells the coordinator to drop the request, unless it has ended. Idempotent."""
        if not self.ended:
            self._link.cancel(self)

    def deliver_token(self, token_id: int) -> None:
        self._token_ids.append(token_id)
        self._wake()

    def deliver(self, update: coordinator_pb2.RequestUpdate) -> None:
        self._updates.append(update)
        self._wake()

    def fail(self, error: PenstockError) -> None:
        self.ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class CoordinatorLink:
    """Keeps a Connect stream open for as long as `run` runs."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        on_mesh: Callable[[coordinator_pb2.MeshState | None], Awaitable[None]],
    ) -> None:
        """`on_mesh` is awaited with every new state of the mesh, and with None when it is lost."""
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        self._on_mesh = on_mesh
        self._ids = itertools.count(1)
        self._open: dict[int, OpenRequest] = {}
        self._submissions: list[coordinator_pb2.Submission] = []
        self._cancellations: list[int] = []
        self._has_news = asyncio.Event()
        self._connected = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_open(self) -> int:
        """Requests that have been submitted and have not ended."""
        return len(self._open)

    async def wait_until_idle(self) -> None:
        """Waits until no request is open."""
        await self._idle.wait()

    def submit(self, submission: coordinator_pb2.Submission) -> OpenRequest:
        """Sends a request, whose id is chosen here; raises Unavailable without a coordinator."""
        if not self._connected:
            raise Unavailable("the coordinator cannot be reached")
        request = OpenRequest(self, next(self._ids))
        submission.request_id = request.request_id
        self._open[request.request_id] = request
        self._idle.clear()
        self._submissions.append(submission)
        self._has_news.set()
        return request

    def cancel(self, request: OpenRequest) -> None:
        """Sends a cancellation; updates that still come are passed on until the last one."""
        self._cancellations.append(request.request_id)
        self._has_news.set()

    async def run(self) -> None:
        """Connects, and connects again, until cancelled."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                await in_own_task(self._serve_stream())
            except* (grpc.RpcError, Unavailable, ProtocolViolation) as group:
                reasons = "; ".join(_reason(error) for error in group.exceptions)
                _LOG.warning("coordinator lost", extra={"why": reasons})
            finally:
                was_connected = self._connected
                await self._drop_stream()
            backoff_s = _FIRST_BACKOFF_S if was_connected else min(_LAST_BACKOFF_S, 2 * backoff_s)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _serve_stream(self) -> None:
        # No deadline: the stream lives as long as both ends. Keepalive finds dead peers.
        call = self._stub.Connect(wait_for_ready=True)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call))
                tasks.create_task(self._read(call))
        finally:
            call.cancel()

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            response = await call.read()
            if not isinstance(response, coordinator_pb2.ConnectResponse):
                raise Unavailable("the coordinator ended the stream")
            if response.HasField("mesh"):
                self._connected = True
                await self._on_mesh(response.mesh)
            self._route_tokens(response.token_request_ids, response.token_ids)
            for update in response.updates:
                self._route(update)

    def _route_tokens(self, request_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        if len(request_ids) != len(token_ids):
            raise ProtocolViolation(f"{len(token_ids)} tokens for {len(request_ids)} requests")
        for request_id, token_id in zip(request_ids, token_ids, strict=True):
            request = self._open.get(request_id)
            if request is not None:
                request.deliver_token(token_id)

    def _route(self, update: coordinator_pb2.RequestUpdate) -> None:
        request = self._open.get(update.request_id)
        if request is None:
            return
        if update.finish_reason:
            self.forget(request)
        request.deliver(update)

    def forget(self, request: OpenRequest) -> None:
        """Drops what still comes for a request."""
        request.ended = True
        self._open.pop(request.request_id, None)
        if not self._open:
            self._idle.set()

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            await self._has_news.wait()
            message = self._next_message()
            try:
                await call.write(message)
            except asyncio.InvalidStateError:  # it ended between two turns
                raise Unavailable("the coordinator ended the stream") from None

    def _next_message(self) -> coordinator_pb2.ConnectRequest:
        """Takes what has gathered; very long prompts are spread over several messages."""
        num_tokens = taken = 0
        for submission in self._submissions:
            if taken and num_tokens + len(submission.token_ids) > _MAX_TOKENS_A_MESSAGE:
                break
            num_tokens += len(submission.token_ids)
            taken += 1
        message = coordinator_pb2.ConnectRequest(submissions=self._submissions[:taken])
        del self._submissions[:taken]
        # A cancellation must not overtake its submission.
        if not self._submissions:
            for request_id in self._cancellations:
                message.cancellations.add(request_id=request_id)
            self._cancellations.clear()
            self._has_news.clear()
        return message

    async def _drop_stream(self) -> None:
        self._connected = False
        self._submissions.clear()
        self._cancellations.clear()
        self._has_news.clear()
        for request in list(self._open.values()):
            self.forget(request)
            request.fail(Unavailable("the coordinator was lost while it served the request"))
        await self._on_mesh(None)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
