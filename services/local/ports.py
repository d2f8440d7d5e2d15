"""Ports of the local machine: which are taken, and such as are kept for parts of a mesh."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from types import TracebackType

from core.errors import InvalidInput, Unavailable

HOST = "127.0.0.1"


class HeldPorts:
    """Keeps ports for processes of ours until they listen, and while they are started again.

    A socket that is bound and never listens keeps a port from all who ask for any free one, and
    from connections; servers that name the port, and allow its reuse as ours do, get it (Linux).
    """

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.release(list(self._sockets))

    def take(self) -> int:
        """A port that was free, and is held from now on."""
        return self._bind(0)

    def hold(self, ports: Iterable[int]) -> None:
        """Holds ports that were chosen before, but for 0, which is any; raises Unavailable where a
        stranger has one."""
        for port in filter(None, ports):
            try:
                self._bind(port)
            except OSError as error:
                raise Unavailable(f"another process has taken the port {port}") from error

    def release(self, ports: Iterable[int]) -> None:
        """Lets ports go; those that are not held are let be."""
        for port in ports:
            if one := self._sockets.pop(port, None):
                one.close()

    def take_over(self, others: HeldPorts) -> None:
        """Holds from now on what `others` did."""
        self._sockets |= others._sockets
        others._sockets = {}

    def _bind(self, port: int) -> int:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except OSError:
            one.close()
            raise
        held = int(one.getsockname()[1])
        self.release([held])
        self._sockets[held] = one
        return held


def is_free(port: int) -> bool:
    """Whether nothing listens on the port. Connections that linger after a close do not count."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except OSError:
            return False
        return True


def require_free(field: str, port: int) -> None:
    """Raises InvalidInput, naming the option `field`, unless the port can be listened on."""
    if not 1 <= port <= 65535:
        raise InvalidInput(field, port, "0 (any free port) to 65535")
    if not is_free(port):
        raise InvalidInput(field, port, "a free port; another process listens on this one")
