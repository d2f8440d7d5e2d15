"""Channels between the processes of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.credentials import Credentials, credentials_of_client

Dial = Callable[[str], grpc.aio.Channel]
# Frames are at most 1 MiB; schedules and answers are far smaller.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# Of channels: between parts of a mesh, which must notice within three seconds that one has gone.
PING_INTERVAL_MS = 1000
PING_TIMEOUT_MS = 1500
_ASKING_TIMEOUT_S = 5.0


def open_channel(
    address: str,
    *,
    credentials: Credentials | None = None,
    role: str = "",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """Opens a channel to `host:port`; connecting is lazy, so that the peer may start later.

    With `credentials` of this process, read anew here, the peer must show that it has this `role`
    in the same mesh, whatever its address. Streams over it say `wait_for_ready=True` themselves,
    and set deadlines. A peer that goes silent is noticed after interval plus timeout of the pings
    (2.5 s).
    """
    options = _options(max_message_bytes)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    name = credentials.identity.peer(role).dns_name
    options = [*options, ("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, credentials.of_channel(), options=options)


async def why_unreachable(channel: grpc.aio.Channel) -> str:
    """Why a channel does not connect, in gRPC's words; "" when it does.

    Calls that `wait_for_ready` wait for ever, and never say why: that of a handshake, say.
    """
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=_ASKING_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return error.details() or "" if error.code() is grpc.StatusCode.UNAVAILABLE else ""
    return ""


def open_public_channel(address: str, *, ca: Path | None) -> grpc.aio.Channel:
    """Opens a channel to a gateway. With `ca`, a PEM file of authorities, all is encrypted, and one
    of them must have certified the address. Raises NotFound where there is no such file."""
    options = _options(MAX_MESSAGE_BYTES)
    if ca is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials_of_client(ca), options=options)


def _options(max_message_bytes: int) -> list[tuple[str, int | str]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A restarted peer is found again at once, not after gRPC's default of minutes. "min" is how
        # long an attempt may take.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 200),
        # Each channel has its own connection, so that links fail and recover independently.
        ("grpc.use_local_subchannel_pool", 1),
        # Parts of a mesh talk directly, whatever proxy the environment names for the web.
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    ]
