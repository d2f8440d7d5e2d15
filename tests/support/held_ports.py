"""Ports that are kept for one process of ours until it listens, and while it is started again."""

from __future__ import annotations

import socket
from types import TracebackType

from services.local.ports import HOST


class HeldPorts:
    """A socket that is bound and never listens keeps a port from all who ask for any free one, and
    from connections; servers that name the port, and allow its reuse as ours do, get it (Linux).
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in self._sockets:
            one.close()

    def take(self) -> int:
        """A port that was free, and is held from now on."""
        one = socket.socket()
        self._sockets.append(one)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((HOST, 0))
        return int(one.getsockname()[1])
