"""Channels between the processes of a mesh."""

from __future__ import annotations

import grpc

# Frames are at most 1 MiB; schedules and answers are far smaller.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# Of channels: between parts of a mesh, which must notice within three seconds that one has gone.
PING_INTERVAL_MS = 1000
PING_TIMEOUT_MS = 1500


def open_channel(address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """Opens a channel to `host:port`; connecting is lazy, so that the peer may start later.

    Streams over it say `wait_for_ready=True` themselves, and set deadlines. A peer
    that goes silent is noticed after interval plus timeout of the pings (2.5 s).
    """
    return grpc.aio.insecure_channel(address, options=_options(max_message_bytes))


def _options(max_message_bytes: int) -> list[tuple[str, int]]:
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
