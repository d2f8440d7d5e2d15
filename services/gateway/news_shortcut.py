"""What a coordinator on the same host says of requests, beside its stream."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from penstock.v1 import coordinator_pb2

from services.common.shortcut import Shortcut, parse


class NewsShortcut:
    """The coordinator speaks first, and before any request is submitted: so news of a request never
    come two ways, of which one could overtake the other."""

    def __init__(
        self,
        connection: socket.socket,
        deliver: Callable[[coordinator_pb2.ConnectResponse], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._greeted: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._shortcut = Shortcut(
            connection, on_message=self._take, on_end=self._ended.set_exception
        )

    async def greeting(self) -> None:
        """Waits until the coordinator has spoken; raises Unavailable when it has gone."""
        await asyncio.wait((self._greeted, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if self._ended.done():
            self._ended.result()

    async def watch(self) -> None:
        """Never returns: raises Unavailable when the coordinator has gone, ProtocolViolation and
        MalformedMessage for what it must not say."""
        await asyncio.shield(self._ended)

    def close(self) -> None:
        """Delivers what was said before the stream ended, and nothing from now on."""
        self._shortcut.take_arrived()
        self._shortcut.close()

    def _take(self, message: bytes) -> None:
        if not self._greeted.done():
            self._greeted.set_result(None)
        self._deliver(parse(coordinator_pb2.ConnectResponse, message))
