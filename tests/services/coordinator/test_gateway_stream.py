"""What waits for a gateway becomes one message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from penstock.v1 import coordinator_pb2

from core.errors import ProtocolViolation, Unavailable
from core.pipeline.actions import EmitTokens
from core.pipeline.cut import Cut, Part
from services.common.shortcut import Shortcut, enter
from services.common.telemetry import start_telemetry
from services.coordinator.gateway_stream import GatewayStream
from services.coordinator.requests import Requests


async def next_message(stream: GatewayStream) -> coordinator_pb2.ConnectResponse | None:
    async with asyncio.timeout(10):
        return await stream.next_message()


async def test_tokens_of_several_requests_travel_packed_and_in_order() -> None:
    stream = GatewayStream()
    stream.add_tokens(7, [1])
    stream.add_tokens(8, [2, 3])
    stream.add_update(7).token_ids.append(4)
    message = await next_message(stream)
    assert message is not None
    assert list(message.token_request_ids) == [7, 8, 8]
    assert list(message.token_ids) == [1, 2, 3]
    assert [list(update.token_ids) for update in message.updates] == [[4]]


async def test_what_was_taken_is_not_sent_again() -> None:
    stream = GatewayStream()
    stream.add_tokens(7, [1])
    await next_message(stream)
    stream.add_tokens(7, [2])
    message = await next_message(stream)
    assert message is not None
    assert list(message.token_ids) == [2]


async def test_a_closed_stream_sends_its_last_tokens_first() -> None:
    stream = GatewayStream()
    stream.add_tokens(7, [1])
    stream.close()
    message = await next_message(stream)
    assert message is not None
    assert list(message.token_ids) == [1]
    assert await next_message(stream) is None


async def test_a_beat_sends_an_empty_message_once() -> None:
    stream = GatewayStream()
    stream.beat()
    assert await next_message(stream) == coordinator_pb2.ConnectResponse()
    stream.add_tokens(7, [1])
    message = await next_message(stream)
    assert message is not None
    assert list(message.token_ids) == [1]


@asynccontextmanager
async def entered(
    stream: GatewayStream,
) -> AsyncIterator[tuple[Shortcut, asyncio.Queue[bytes]]]:
    """The gateway's end of the shortcut, and what it hears."""
    stream.offer_shortcut()
    stream.set_mesh(coordinator_pb2.MeshState())
    first = await next_message(stream)
    assert first is not None
    connection = enter(first.shortcut, first.shortcut_token)
    assert connection is not None
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    end = Shortcut(connection, on_message=heard.put_nowait, on_end=lambda error: None)
    async with asyncio.timeout(10):
        assert await heard.get() == b""
        yield end, heard
    end.close()
    stream.leave()


async def test_news_leave_over_the_shortcut_and_the_mesh_over_the_stream() -> None:
    stream = GatewayStream()
    async with entered(stream) as (_, heard):
        stream.add_tokens(7, [1])
        stream.set_mesh(coordinator_pb2.MeshState(waiting=True))
        stream.wake()
        news = coordinator_pb2.ConnectResponse.FromString(await heard.get())
        assert (list(news.token_request_ids), list(news.token_ids)) == ([7], [1])
        assert not news.HasField("mesh")
        message = await next_message(stream)
        assert message is not None
        assert (message.mesh.waiting, list(message.token_ids)) == (True, [])
        stream.beat()
        assert await next_message(stream) == coordinator_pb2.ConnectResponse()


async def test_a_gateway_that_leaves_the_shortcut_ends_the_stream() -> None:
    stream = GatewayStream()
    async with entered(stream) as (end, _):
        end.close()
        with pytest.raises(Unavailable):
            await next_message(stream)


async def test_a_gateway_that_speaks_where_it_only_listens_ends_the_stream() -> None:
    stream = GatewayStream()
    async with entered(stream) as (end, _):
        end.send(b"hello")
        with pytest.raises(ProtocolViolation):
            await next_message(stream)


async def test_a_gateway_that_does_not_read_its_shortcut_ends_the_stream() -> None:
    stream = GatewayStream()
    async with entered(stream) as (end, _):
        asyncio.get_running_loop().remove_reader(end._connection)
        update = stream.add_update(7)
        update.refusal.message = "a" * (4 << 20)
        while stream._error is None:
            stream.wake()
            stream.add_update(7).CopyFrom(update)
        with pytest.raises(Unavailable):
            await next_message(stream)


async def test_what_computes_a_request_is_told_beside_its_first_tokens() -> None:
    """Tokens that follow before the message leaves come behind the first ones."""
    telemetry = start_telemetry("test", metrics_port=None, environment={})
    requests = Requests(telemetry, post=lambda event: None, clock=lambda: 0.0)
    gateway = requests.connect(coordinator_pb2.MeshState())
    submission = coordinator_pb2.Submission(request_id=7, token_ids=[1])
    submission.sampling.max_tokens = 9
    requests.submit(gateway, submission)
    cut = Cut((Part(0, ("a",)),))
    requests.emit(EmitTokens(request_id=1, token_ids=[5], logprobs=[], began_on=cut))
    requests.emit(EmitTokens(request_id=1, token_ids=[6], logprobs=[]))
    message = await gateway.next_message()
    assert message is not None
    assert list(message.token_ids) == [5, 6]
    (update,) = message.updates
    assert (update.request_id, list(update.token_ids)) == (7, [])
    assert list(update.began_on.layer_digests) == ["a"]
    telemetry.shutdown()
