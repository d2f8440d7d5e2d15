"""Sends sequences of bytes as an RPC, whatever they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from tests.fuzz.rpc.methods import RpcMethod

# No RPC here has work for so long, not even on a busy machine.
DEADLINE_S = 20.0
# A stream that says nothing for so long after all was sent waits for more, and is left.
SILENCE_S = 0.25
MOST_RESPONSES = 64
# Ours, of an RPC that gRPC did not end.
NOT_AT_DEADLINE = "not even at its deadline"
# What grpc.aio says where a write and the status of a stream that has ended meet. A server's own
# internal errors have an id, and are logged.
CLIENTS_OWN = "Internal error from Core"
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended. `code` is None where we left it, since it waits for more by its nature."""

    code: grpc.StatusCode | None
    details: str
    seconds: float
    responses: tuple[bytes, ...] = ()


def open_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=OPTIONS)


async def call(
    channel: grpc.aio.Channel,
    method: RpcMethod,
    messages: Sequence[bytes],
    *,
    metadata: Metadata = (),
) -> Outcome:
    """Sends the messages, reads what comes, and says how it ended."""
    started_s = time.monotonic()
    responses: list[bytes] = []
    try:
        # The client's own deadline, for a client that does not end at the RPC's.
        async with asyncio.timeout(DEADLINE_S + 10):
            ended = await _send(channel, method, messages, metadata, responses)
        code, details = (grpc.StatusCode.OK, "") if ended else (None, "")
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details() or ""
    except TimeoutError:
        code, details = grpc.StatusCode.DEADLINE_EXCEEDED, NOT_AT_DEADLINE
    seconds = time.monotonic() - started_s
    return Outcome(code=code, details=details, seconds=seconds, responses=tuple(responses))


async def _send(
    channel: grpc.aio.Channel,
    method: RpcMethod,
    messages: Sequence[bytes],
    metadata: Metadata,
    responses: list[bytes],
) -> bool:
    """Returns whether the RPC ended by itself."""
    how: dict[str, Any] = {
        "timeout": method.deadline_s or DEADLINE_S,
        "metadata": metadata,
        "wait_for_ready": True,
    }
    if method.request_streaming:
        stream = channel.stream_stream(method.path)(**how)
        writing = asyncio.create_task(_write(stream, messages, ends=not method.may_wait))
        try:
            return await _read(stream, responses, may_wait=method.may_wait)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
    if method.response_streaming:
        stream = channel.unary_stream(method.path)(messages[0], **how)
        return await _read(stream, responses, may_wait=method.may_wait)
    unary = channel.unary_unary(method.path)
    responses.append(await unary(messages[0], **how))
    return True


async def _write(stream: Any, messages: Sequence[bytes], *, ends: bool) -> None:
    for message in messages:
        await stream.write(message)
    if ends:
        await stream.done_writing()


async def _read(stream: Any, responses: list[bytes], *, may_wait: bool) -> bool:
    try:
        while True:
            async with asyncio.timeout(SILENCE_S if may_wait else None):
                response = await stream.read()
            if response is grpc.aio.EOF:
                return True
            if len(responses) < MOST_RESPONSES:
                responses.append(response)
    except TimeoutError:
        return False
    finally:
        stream.cancel()
