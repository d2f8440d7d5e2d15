"""The link to the coordinator: how it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
from penstock.v1 import coordinator_pb2

from core.errors import Unavailable
from services.gateway.coordinator_link import CoordinatorLink
from services.gateway.open_requests import OpenRequests
from tests.support.fake_coordinator import FakeCoordinator

DEADLINE_S = 20.0
OnMesh = Callable[[coordinator_pb2.MeshState | None], Awaitable[None]]


def make_link(*ports: int, on_mesh: OnMesh) -> CoordinatorLink:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return CoordinatorLink(addresses, OpenRequests(resume_limit_s=600.0), on_mesh=on_mesh)


async def test_a_link_that_is_cancelled_while_its_stream_breaks_ends() -> None:
    coordinator = FakeCoordinator()
    port = await coordinator.start()
    states = []

    async def on_mesh(state: coordinator_pb2.MeshState | None) -> None:
        states.append(state)
        if state is not None:
            running.cancel()
            raise Unavailable("a test breaks it")

    async with asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(make_link(port, on_mesh=on_mesh).run())
        with pytest.raises(asyncio.CancelledError):
            await running
    await coordinator.stop()
    assert [state is None for state in states] == [False, True]


async def test_tokens_that_name_no_request_end_the_stream_and_the_link_dials_again() -> None:
    coordinator = FakeCoordinator()
    port = await coordinator.start()
    states: asyncio.Queue[coordinator_pb2.MeshState | None] = asyncio.Queue()
    async with asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(make_link(port, on_mesh=states.put).run())
        assert await states.get() is not None
        coordinator.send_message(coordinator_pb2.ConnectResponse(token_ids=[1]))
        assert await states.get() is None
        assert await states.get() is not None
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await coordinator.stop()


async def test_when_one_coordinator_is_lost_the_next_address_is_dialled() -> None:
    first, second = FakeCoordinator(), FakeCoordinator()
    ports = await first.start(), await second.start()
    states: asyncio.Queue[coordinator_pb2.MeshState | None] = asyncio.Queue()
    async with asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(make_link(*ports, on_mesh=states.put).run())
        assert await states.get() is not None
        assert (first.num_streams, second.num_streams) == (1, 0)
        await first.stop()
        assert await states.get() is None
        assert await states.get() is not None
        assert (first.num_streams, second.num_streams) == (1, 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await second.stop()


async def test_a_coordinator_without_a_pulse_is_lost() -> None:
    coordinator = FakeCoordinator()
    port = await coordinator.start()
    states: asyncio.Queue[coordinator_pb2.MeshState | None] = asyncio.Queue()
    async with asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(make_link(port, on_mesh=states.put).run())
        assert await states.get() is not None
        coordinator.is_silent = True
        assert await states.get() is None
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await coordinator.stop()


async def test_a_coordinator_that_says_nothing_is_left_for_the_next() -> None:
    coordinator = FakeCoordinator()
    states: asyncio.Queue[coordinator_pb2.MeshState | None] = asyncio.Queue()
    # The kernel takes connections for it, and nobody reads them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = silent.getsockname()[1], await coordinator.start()
        running = asyncio.create_task(make_link(*ports, on_mesh=states.put).run())
        assert await asyncio.wait_for(states.get(), DEADLINE_S) is not None
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await coordinator.stop()


async def test_one_that_waits_is_left_to_wait_while_there_may_be_another_one() -> None:
    waiting, serving = FakeCoordinator(), FakeCoordinator()
    waiting.mesh.waiting = True
    ports = await waiting.start(), await serving.start()
    states: asyncio.Queue[coordinator_pb2.MeshState | None] = asyncio.Queue()
    async with asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(make_link(*ports, on_mesh=states.put).run())
        state = await states.get()
        assert state is not None
        assert not state.waiting
        assert waiting.takeovers.empty()
        await serving.stop()
        assert await states.get() is None
        state = await states.get()
        assert state is not None
        assert state.waiting
        await waiting.takeovers.get()
        assert waiting.takeovers.empty()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await waiting.stop()
