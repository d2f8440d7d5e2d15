"""The link to the coordinator: how it ends."""

from __future__ import annotations

import asyncio

import pytest
from penstock.v1 import coordinator_pb2

from core.errors import Unavailable
from services.common.channels import open_channel
from services.gateway.coordinator_link import CoordinatorLink
from tests.support.fake_coordinator import FakeCoordinator

DEADLINE_S = 20.0


async def test_a_link_that_is_cancelled_while_its_stream_breaks_ends() -> None:
    coordinator = FakeCoordinator()
    port = await coordinator.start()
    states = []

    async def on_mesh(state: coordinator_pb2.MeshState | None) -> None:
        states.append(state)
        if state is not None:
            running.cancel()
            raise Unavailable("a test breaks it")

    async with open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(CoordinatorLink(channel, on_mesh=on_mesh).run())
        with pytest.raises(asyncio.CancelledError):
            await running
    await coordinator.stop()
    assert [state is None for state in states] == [False, True]


async def test_tokens_that_name_no_request_end_the_stream_and_the_link_dials_again() -> None:
    coordinator = FakeCoordinator()
    port = await coordinator.start()
    states: asyncio.Queue[coordinator_pb2.MeshState | None] = asyncio.Queue()
    async with open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(DEADLINE_S):
        running = asyncio.create_task(CoordinatorLink(channel, on_mesh=states.put).run())
        assert await states.get() is not None
        coordinator.send_message(coordinator_pb2.ConnectResponse(token_ids=[1]))
        assert await states.get() is None
        assert await states.get() is not None
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await coordinator.stop()
