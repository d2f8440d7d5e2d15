from __future__ import annotations

import socket

import pytest

from core.errors import InvalidInput
from services.local.ports import free_ports, is_free, require_free


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(is_free(port) for port in ports)


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
