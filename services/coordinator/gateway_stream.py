"""One gateway's Connect stream: what is waiting to be sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.v1 import coordinator_pb2

from core.errors import Exhausted

# Updates and tokens that a gateway has not yet taken: at 64 bytes each some megabytes. A
# gateway that is so far behind has stopped reading.
_MAX_UPDATES = 65_536


class GatewayStream:
    """Collects news of a loop turn (or of many, while the gateway is slow) into one message."""

    def __init__(self) -> None:
        self.request_ids: dict[int, int] = {}  # the gateway's number to ours, open ones
        self._pending = coordinator_pb2.ConnectResponse()
        self._token_request_ids: list[int] = []
        self._token_ids: list[int] = []
        self._has_news = asyncio.Event()
        self._is_pulse_due = False
        self._is_closed = False

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
        self._pending.mesh.CopyFrom(mesh)
        self._has_news.set()

    def beat(self) -> None:
        """Sends a message even if there is nothing to say: the coordinator's pulse."""
        self._is_pulse_due = True
        self._has_news.set()

    def wake(self) -> None:
        """Lets what was added be sent."""
        self._has_news.set()

    def close(self) -> None:
        """Ends the stream once everything added has been sent."""
        self._is_closed = True
        self._has_news.set()

    async def next_message(self) -> coordinator_pb2.ConnectResponse | None:
        """Everything new since the last message, which may be just the pulse; None when closed.

        Raises Exhausted when the gateway has fallen hopelessly behind.
        """
        while not self._has_pending:
            if self._is_closed:
                return None
            self._has_news.clear()
            await self._has_news.wait()
        self._is_pulse_due = False
        message, self._pending = self._pending, coordinator_pb2.ConnectResponse()
        message.token_request_ids.extend(self._token_request_ids)
        message.token_ids.extend(self._token_ids)
        self._token_request_ids.clear()
        self._token_ids.clear()
        num_news = len(message.updates) + len(message.token_ids)
        if num_news > _MAX_UPDATES:
            raise Exhausted(f"{num_news} updates were not read")
        return message

    @property
    def _has_pending(self) -> bool:
        pending = self._pending
        has_news = self._token_ids or pending.updates or pending.HasField("mesh")
        return bool(has_news) or self._is_pulse_due
