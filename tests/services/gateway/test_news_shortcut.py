"""News over the shortcut beside the stream, between a real link and a coordinator's real stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from services.common.servers import bind, create_server
from services.common.telemetry import no_telemetry
from services.coordinator.gateway_stream import GatewayStream
from services.gateway.coordinator_link import CoordinatorLink
from services.gateway.open_requests import OpenRequests

DEADLINE_S = 20.0
LOST = None


@dataclass
class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Serves one gateway, and keeps what the stream carries."""

    offers_shortcut: bool = True
    stream: GatewayStream = field(init=False)
    num_streams: int = 0
    carried: list[coordinator_pb2.ConnectResponse] = field(default_factory=list)
    submitted: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    async def Connect(
        self, requests: AsyncIterator[coordinator_pb2.ConnectRequest], context: Any
    ) -> AsyncIterator[coordinator_pb2.ConnectResponse]:
        self.num_streams += 1
        self.stream = stream = GatewayStream()
        if self.offers_shortcut:
            stream.offer_shortcut()
        stream.set_mesh(mesh())
        reading = asyncio.create_task(self._read(requests))
        beating = asyncio.create_task(self._beat(stream))
        try:
            while (message := await stream.next_message()) is not None:
                self.carried.append(message)
                yield message
        finally:
            reading.cancel()
            beating.cancel()
            stream.leave()

    async def _read(self, requests: AsyncIterator[coordinator_pb2.ConnectRequest]) -> None:
        async for request in requests:
            for submission in request.submissions:
                self.submitted.put_nowait(submission.request_id)

    async def _beat(self, stream: GatewayStream) -> None:
        while True:
            await asyncio.sleep(0.5)
            stream.beat()

    def say(self, request_id: int, token_id: int) -> None:
        """One turn of the loop, with a token."""
        self.stream.add_tokens(request_id, [token_id])
        self.stream.wake()


@dataclass
class Linked:
    coordinator: Coordinator
    requests: OpenRequests
    states: asyncio.Queue[coordinator_pb2.MeshState | None]


def mesh() -> coordinator_pb2.MeshState:
    state = coordinator_pb2.MeshState(stages_ready=[True])
    state.model.ready = True
    return state


@asynccontextmanager
async def linked(*, offers_shortcut: bool) -> AsyncIterator[Linked]:
    coordinator = Coordinator(offers_shortcut=offers_shortcut)
    server = create_server(no_telemetry())
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(coordinator, server)
    port = bind(server, "127.0.0.1:0")
    await server.start()
    requests = OpenRequests(resume_limit_s=600.0)
    states: asyncio.Queue[coordinator_pb2.MeshState | None] = asyncio.Queue()
    link = CoordinatorLink([f"127.0.0.1:{port}"], requests, on_mesh=states.put)
    running = asyncio.create_task(link.run())
    async with asyncio.timeout(DEADLINE_S):
        assert await states.get() is not LOST
        yield Linked(coordinator, requests, states)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await server.stop(None)


@pytest.mark.parametrize("offers_shortcut", [True, False])
async def test_tokens_come_one_way_or_the_other(offers_shortcut: bool) -> None:
    async with linked(offers_shortcut=offers_shortcut) as all_of_it:
        coordinator = all_of_it.coordinator
        request = all_of_it.requests.submit(coordinator_pb2.Submission(token_ids=[1]))
        request_id = await coordinator.submitted.get()
        for token_id in (5, 6):
            coordinator.say(request_id, token_id)
            assert (await request.receive()).token_ids == [token_id]
    carried = [token_id for message in coordinator.carried for token_id in message.token_ids]
    assert carried == ([] if offers_shortcut else [5, 6])


async def test_what_was_said_before_the_stream_ended_is_delivered() -> None:
    async with linked(offers_shortcut=True) as all_of_it:
        coordinator = all_of_it.coordinator
        request = all_of_it.requests.submit(coordinator_pb2.Submission(token_ids=[1]))
        coordinator.say(await coordinator.submitted.get(), 5)
        coordinator.stream.close()
        assert await all_of_it.states.get() is LOST
        assert (await request.receive()).token_ids == [5]


async def test_a_coordinator_that_ends_the_shortcut_alone_is_dialled_again() -> None:
    async with linked(offers_shortcut=True) as all_of_it:
        all_of_it.coordinator.stream.leave()
        assert await all_of_it.states.get() is LOST
        assert await all_of_it.states.get() is not LOST
        assert all_of_it.coordinator.num_streams == 2


async def test_news_that_cannot_be_read_end_the_stream() -> None:
    async with linked(offers_shortcut=True) as all_of_it:
        stream = all_of_it.coordinator.stream
        stream.add_tokens(9, [1])
        stream._token_ids.append(2)  # two tokens for one request: what no coordinator says
        stream.wake()
        assert await all_of_it.states.get() is LOST
        assert await all_of_it.states.get() is not LOST
