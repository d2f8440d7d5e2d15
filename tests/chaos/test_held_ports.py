"""Ports held for parts of a mesh."""

from __future__ import annotations

import socket

import pytest

from services.common.servers import bind, create_server
from services.common.telemetry import no_telemetry
from services.local.ports import HOST
from tests.support.held_ports import HeldPorts


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
