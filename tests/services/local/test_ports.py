from __future__ import annotations

import socket

import pytest

from core.errors import InvalidInput, Unavailable
from services.common.servers import bind, create_server
from services.common.telemetry import no_telemetry
from services.local.ports import HOST, HeldPorts, require_free


def test_nobody_gets_a_held_port_by_chance() -> None:
    with HeldPorts() as held, socket.socket() as other:
        port = held.take()
        with pytest.raises(OSError, match="Address already in use"):
            other.bind((HOST, port))


async def test_a_server_that_names_it_gets_it_again_and_again() -> None:
    with HeldPorts() as held:
        port = held.take()
        for _ in range(2):
            server = create_server(no_telemetry())
            assert bind(server, f"{HOST}:{port}") == port
            await server.start()
            await server.stop(None)


def test_a_port_is_free_once_its_last_holder_lets_it_go() -> None:
    with HeldPorts() as first, HeldPorts() as second, socket.socket() as other:
        port = first.take()
        second.hold([port, port])
        first.close()
        with pytest.raises(OSError, match="Address already in use"):
            other.bind((HOST, port))
        second.release([port])
        other.bind((HOST, port))


def test_ports_taken_over_outlive_whoever_took_them() -> None:
    with HeldPorts() as last, socket.socket() as other:
        with HeldPorts() as first:
            port = first.take()
            last.take_over(first)
        with pytest.raises(OSError, match="Address already in use"):
            other.bind((HOST, port))


def test_a_port_that_a_stranger_has_cannot_be_held() -> None:
    with HeldPorts() as held, socket.create_server((HOST, 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(Unavailable, match=f"port {port}"):
            held.hold([port])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_listened_on_is_refused_by_name(host: str) -> None:
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=rf"grpc_port is {port}.*another process listens"):
            require_free("grpc_port", port)


def test_a_port_that_was_closed_a_moment_ago_is_free() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    accepted.close()
    server.close()
    assert client.recv(1) == b""
    client.close()
    require_free("grpc_port", port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(InvalidInput, match="65535"):
        require_free("metrics_port", port)
