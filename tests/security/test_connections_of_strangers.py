"""What a client may do to a connection: fill it, flood it, or say nothing on it.

After each abuse the gateway answers the next client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb
from penstock.v1 import generation_pb2_grpc

from services.common.channels import open_channel
from services.common.servers import HANDSHAKE_TIMEOUT_MS, bind, create_server
from services.common.telemetry import no_telemetry
from tests.services.gateway.conftest import Setup

GENERATE = "/penstock.v1.GenerationService/Generate"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def ask_as_another_client(setup: Setup) -> None:
    async with open_channel(f"127.0.0.1:{setup.port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(prompt="good"), timeout=60)
        assert "".join([response.text async for response in call]) == "good"


@pytest.fixture
async def still_serving(setup: Setup) -> AsyncIterator[None]:
    """Afterwards another client is served."""
    yield
    await ask_as_another_client(setup)


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value.code()


@pytest.mark.usefixtures("still_serving")
async def test_a_small_message_that_unpacks_to_a_big_one_is_refused(setup: Setup) -> None:
    async with open_channel(f"127.0.0.1:{setup.port}", max_message_bytes=1 << 30) as channel:
        bomb = pb.GenerateRequest(prompt="x" * 100_000_000).SerializeToString()
        call = channel.unary_stream(GENERATE)(bomb, compression=grpc.Compression.Gzip, timeout=60)
        assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.usefixtures("still_serving")
async def test_headers_of_a_megabyte_are_refused(setup: Setup) -> None:
    metadata = [("x-bomb", "x" * 1_000_000)]
    call = setup.generation.Generate(pb.GenerateRequest(prompt="a"), metadata=metadata, timeout=60)
    assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.usefixtures("still_serving")
async def test_ten_thousand_headers_are_refused(setup: Setup) -> None:
    metadata = [(f"x-{number}", "x") for number in range(10_000)]
    call = setup.generation.Generate(pb.GenerateRequest(prompt="a"), metadata=metadata, timeout=60)
    assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_opens_more_streams_than_it_may_keeps_nobody_out() -> None:
    max_streams, num_open = 50, 0
    is_full, ending = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Any) -> bytes:
        nonlocal num_open
        if request == b"wait":
            num_open += 1
            if num_open == max_streams:
                is_full.set()
            await ending.wait()
        return request

    server = create_server(no_telemetry(), max_streams=max_streams)
    handlers = {"Method": grpc.unary_unary_rpc_method_handler(wait)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
    address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
    await server.start()
    async with open_channel(address) as flooding, open_channel(address) as other:
        method = flooding.unary_unary("/service/Method")
        flood = [method(b"wait") for _ in range(2 * max_streams)]
        await is_full.wait()
        assert await other.unary_unary("/service/Method")(b"served", timeout=60) == b"served"
        assert num_open == max_streams
        for call in flood:
            call.cancel()
    await server.stop(None)


@pytest.mark.usefixtures("still_serving")
async def test_connections_that_say_nothing_are_closed(setup: Setup) -> None:
    """Slow-loris: with nothing, with a part of what HTTP/2 begins with, or with that alone."""
    beginnings = [b"", HTTP2_PREFACE[:10], HTTP2_PREFACE] * 20
    connections = []
    for beginning in beginnings:
        reader, writer = await asyncio.open_connection("127.0.0.1", setup.port)
        writer.write(beginning)
        connections.append((reader, writer))
    async with asyncio.timeout(6 * HANDSHAKE_TIMEOUT_MS / 1e3):
        for reader, writer in connections:
            await reader.read()  # to its end
            writer.close()
