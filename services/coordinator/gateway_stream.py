"""One gateway's Connect stream: what is waiting to be sent to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from penstock.v1 import coordinator_pb2

from core.errors import Exhausted, ProtocolViolation, Unavailable
from services.common.shortcut import Door, Shortcut

# Updates and tokens that a gateway has not yet taken: at 64 bytes each some megabytes. A
# gateway that is so far behind has stopped reading.
_MAX_UPDATES = 65_536


class GatewayStream:
    """Collects news of a loop turn (or of many, while the gateway is slow) into one message.

    Once the gateway has entered the shortcut that it was offered, news of requests leave over that
    at the end of each turn, and the stream has the mesh and the pulse alone.
    """

    def __init__(self) -> None:
        self.request_ids: dict[int, int] = {}  # the gateway's number to ours, open ones
        self._pending = coordinator_pb2.ConnectResponse()
        self._mesh: coordinator_pb2.MeshState | None = None  # to be told
        self._token_request_ids: list[int] = []
        self._token_ids: list[int] = []
        self._has_news = asyncio.Event()
        self._is_pulse_due = False
        self._is_closed = False
        self._door: Door | None = None
        self._shortcut: Shortcut | None = None
        self._error: Exception | None = None  # what the shortcut ended with

    def offer_shortcut(self) -> None:
        """Lets the first message say where the gateway may enter."""
        self._door = Door(self._on_entered)
        self._pending.shortcut = self._door.address
        self._pending.shortcut_token = self._door.token

    def add_tokens(self, request_id: int, token_ids: Sequence[int]) -> None:
        """Adds tokens with nothing to say of them; call `wake` when the turn is over.

        None may follow an update of the same request: tokens are read first.
        """
        self._token_ids += token_ids
        self._token_request_ids += [request_id] * len(token_ids)

    def add_update(self, request_id: int) -> coordinator_pb2.RequestUpdate:
        """Begins an update of a request, to be filled in; call `wake` when the turn is over."""
        update = self._pending.updates.add()
        update.request_id = request_id
        return update

    def set_mesh(self, mesh: coordinator_pb2.MeshState) -> None:
        self._mesh = mesh
        self._has_news.set()

    def beat(self) -> None:
        """Sends a message even if there is nothing to say: the coordinator's pulse."""
        self._is_pulse_due = True
        self._has_news.set()

    def wake(self) -> None:
        """Lets what was added be sent."""
        if self._shortcut is None:
            self._has_news.set()
        elif self._has_request_news:
            try:
                self._shortcut.send(self._take_news().SerializeToString())
            except Unavailable as error:
                self._fail(error)

    def close(self) -> None:
        """Ends the stream once everything added has been sent."""
        self._is_closed = True
        self._has_news.set()

    def leave(self) -> None:
        """The stream is over: the shortcut is, too."""
        if self._door is not None:
            self._door.close()
        if self._shortcut is not None:
            self._shortcut.close()

    async def next_message(self) -> coordinator_pb2.ConnectResponse | None:
        """What the stream has to say since its last message, which may be just the pulse; None
        when closed.

        Raises Exhausted when the gateway has fallen hopelessly behind, and what the shortcut ended
        with.
        """
        while not self._has_pending:
            if self._error is not None:
                raise self._error
            if self._is_closed:
                return None
            self._has_news.clear()
            await self._has_news.wait()
        self._is_pulse_due = False
        message = coordinator_pb2.ConnectResponse()
        if self._shortcut is None:
            message = self._take_news()
        if self._mesh is not None:
            message.mesh.CopyFrom(self._mesh)
            self._mesh = None
        num_news = len(message.updates) + len(message.token_ids)
        if num_news > _MAX_UPDATES:
            raise Exhausted(f"{num_news} updates were not read")
        return message

    def _take_news(self) -> coordinator_pb2.ConnectResponse:
        message, self._pending = self._pending, coordinator_pb2.ConnectResponse()
        message.token_request_ids.extend(self._token_request_ids)
        message.token_ids.extend(self._token_ids)
        self._token_request_ids.clear()
        self._token_ids.clear()
        return message

    def _on_entered(self, connection: socket.socket) -> None:
        self._shortcut = Shortcut(connection, on_message=_refuse, on_end=self._fail)
        self._shortcut.send(b"")  # the empty message: the gateway waits for it before it submits
        self.wake()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._has_news.set()

    @property
    def _has_pending(self) -> bool:
        if self._mesh is not None or self._is_pulse_due:
            return True
        return self._shortcut is None and self._has_request_news

    @property
    def _has_request_news(self) -> bool:
        return bool(self._token_ids or self._pending.updates)


def _refuse(message: bytes) -> None:
    raise ProtocolViolation(f"a gateway said {len(message)} bytes where it only listens")
