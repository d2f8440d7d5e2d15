"""gRPC servers: how they are made, bound, run and stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NoReturn

import grpc
import uvloop

from core.errors import InvalidInput, PenstockError
from services.common.addresses import is_loopback
from services.common.channels import MAX_MESSAGE_BYTES, PING_INTERVAL_MS
from services.common.credentials import Credentials
from services.common.identity import CallPolicy
from services.common.interceptors import ServerInterceptor
from services.common.telemetry import Telemetry

_LOG = logging.getLogger(__name__)
# Of servers, whose clients may be anywhere: silent ones are noticed after both.
_PING_INTERVAL_MS = 10_000
_PING_TIMEOUT_MS = 5_000
# Of one connection; more wait at the client. Enough for what a queue holds and what runs.
MAX_STREAMS = 2048
# Of all connections; more are refused with RESOURCE_EXHAUSTED. Each costs some 50 KB.
MAX_RPCS = 8192
# For a connection that says nothing, or only the beginning of what HTTP/2 begins with.
HANDSHAKE_TIMEOUT_MS = 10_000


def create_server(
    telemetry: Telemetry,
    *,
    credentials: Credentials | None = None,
    max_receive_bytes: int = MAX_MESSAGE_BYTES,
    max_send_bytes: int = MAX_MESSAGE_BYTES,
    max_streams: int = MAX_STREAMS,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> grpc.aio.Server:
    """Creates a server whose handlers may raise errors of ours; see `interceptors.py`.

    With `credentials` of this process, others of its mesh may call only what `identity.py` allows
    them; `bind` then must have them too, so that callers show who they are.
    Handlers of `interceptors` may, too: they stand within the one that turns errors into statuses.
    Messages above `max_receive_bytes` get RESOURCE_EXHAUSTED from gRPC itself. Of what one
    connection asks for at a time beyond `max_streams`, the rest waits at the client.
    """
    options = [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", max_send_bytes),
        # Two servers on one port would share its connections between them, silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", max_streams),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", _PING_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients that ping as often as our channels do are welcome.
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS // 2),
    ]
    policy = None
    if credentials is not None:
        policy = CallPolicy(credentials.identity, is_revoked=credentials.have_revoked)
    outermost = ServerInterceptor(telemetry, policy=policy)
    return grpc.aio.server(
        interceptors=[outermost, *interceptors],
        options=options,
        maximum_concurrent_rpcs=MAX_RPCS,
    )


def bind(
    server: grpc.aio.Server,
    address: str,
    *,
    credentials: Credentials | None = None,
    is_public: bool = False,
    insecure: bool = False,
) -> int:
    """Takes `host:port` for the server and returns the port (port 0: a free one).

    With `credentials` all is encrypted, and clients must have a certificate of the same authority,
    unless the port `is_public`. Without them only loopback addresses are taken, unless it shall be
    `insecure`. Raises InvalidInput when that forbids the address, it is malformed or the port is
    taken.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput("listen", address, "host:port")
    if credentials is None and not insecure and not is_loopback(address):
        raise InvalidInput(
            "listen",
            address,
            "a loopback address such as 127.0.0.1:PORT; anything else with --certs FOLDER, which "
            "`penstock certs init` makes, or with --insecure, unencrypted and open to everyone",
        )
    try:
        return add_port(server, address, credentials=credentials, is_public=is_public)
    except RuntimeError as error:
        allowed = "an address of this machine with a free port"
        raise InvalidInput("listen", address, allowed) from error


def add_port(
    server: grpc.aio.Server,
    address: str,
    *,
    credentials: Credentials | None,
    is_public: bool = False,
) -> int:
    """Takes any address of gRPC's, Unix-domain sockets too; raises RuntimeError."""
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, credentials.of_server(asks_clients=not is_public))


async def run_until_stopped(
    server: grpc.aio.Server,
    *,
    tasks: Sequence[Coroutine[Any, Any, None]] = (),
    drain: Callable[[], Awaitable[None]] | None = None,
    grace_s: float = 5.0,
    exit_with_parent: bool = False,
) -> None:
    """Runs a started server until SIGINT or SIGTERM, then drains and stops it.

    `tasks` run beside the server. One that returns has done its work; one that fails
    stops the server, and its error is raised. `drain` is awaited before the server
    stops taking calls; running calls then have `grace_s`. With `exit_with_parent` the
    end of standard input counts as a signal: whoever started this process holds the
    other end of the pipe, and it breaks however that process dies. A second signal
    ends the process at once.
    """
    stop = asyncio.Event()
    _on_signals(stop)
    if exit_with_parent:
        _on_end_of_input(stop)
    running = [asyncio.ensure_future(task) for task in tasks]
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await _first_failure_or(stopping, running)
        if drain is not None:
            await drain()
    finally:
        stopping.cancel()
        for task in running:
            task.cancel()
        await server.stop(grace_s)
        await asyncio.gather(stopping, *running, return_exceptions=True)


def run_process(main: Coroutine[Any, Any, None]) -> None:
    """Runs a process's main coroutine; an error of ours is one line on stderr and exit code 1."""
    try:
        uvloop.run(main)
    except PenstockError as error:
        exit_with(error)


def exit_with(error: PenstockError) -> NoReturn:
    """Ends the process with exit code 1 and the error as one line on stderr."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(1)


async def _first_failure_or(
    stopping: asyncio.Future[Any], running: Sequence[asyncio.Future[None]]
) -> None:
    pending: set[asyncio.Future[Any]] = {stopping, *running}
    while not stopping.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def begin() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in signals:
        loop.add_signal_handler(number, begin)


def _on_end_of_input(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()

    def readable() -> None:
        if not os.read(descriptor, 4096):
            _LOG.info("the parent process has gone")
            loop.remove_reader(descriptor)
            stop.set()

    loop.add_reader(descriptor, readable)
