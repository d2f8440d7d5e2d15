"""Ports of the local machine: which are taken, and free ones for the inner parts."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from core.errors import InvalidInput

HOST = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


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
