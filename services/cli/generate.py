"""Asks a mesh for text through the public API and writes the text as it comes."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import grpc.aio
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.common.keys import as_metadata

CONNECT_TIMEOUT_S = 10.0


async def choose_model(channel: grpc.aio.Channel, name: str, *, key: str | None) -> pb.Model | None:
    """The model that requests with this name reach; None where the mesh has no such model."""
    stub = GenerationServiceStub(channel)
    listed = await stub.ListModels(
        pb.ListModelsRequest(), timeout=CONNECT_TIMEOUT_S, metadata=as_metadata(key)
    )
    if not name and len(listed.models) == 1:
        return listed.models[0]
    return next((model for model in listed.models if model.name == name), None)


async def make_request(
    channel: grpc.aio.Channel,
    prompt: str,
    *,
    model: str,
    system: str | None,
    raw: bool,
    sampling: pb.SamplingParameters,
    key: str | None,
) -> pb.GenerateRequest:
    """A conversation where the model has a chat template and `raw` is not asked for."""
    request = pb.GenerateRequest(model=model, sampling=sampling)
    found = None if raw else await choose_model(channel, model, key=key)
    if found is None or not found.has_chat_template:
        request.prompt = prompt
        return request
    if system is not None:
        request.messages.add(role="system", content=system)
    request.messages.add(role="user", content=prompt)
    return request


async def stream_answer(
    channel: grpc.aio.Channel,
    request: pb.GenerateRequest,
    *,
    write: Callable[[str], None],
    key: str | None,
    timeout_s: float | None = None,
) -> pb.GenerateResponse:
    """Calls `write` with every piece of text; returns the last message, which has the usage.

    Raises grpc.RpcError. Cancelling the awaiting task cancels the call.
    """
    stub = GenerationServiceStub(channel)
    response = pb.GenerateResponse()
    async for response in stub.Generate(request, timeout=timeout_s, metadata=as_metadata(key)):
        if response.text:
            write(response.text)
    return response


def describe_usage(last: pb.GenerateResponse) -> str:
    """Finish reason, token counts and times in one line."""
    usage = last.usage
    seconds = usage.decode_duration.ToTimedelta().total_seconds()
    rate = f", {(usage.completion_tokens - 1) / seconds:.0f} tokens/s" if seconds > 0 else ""
    queue_ms = usage.queue_duration.ToTimedelta().total_seconds() * 1e3
    prefill_ms = usage.prefill_duration.ToTimedelta().total_seconds() * 1e3
    reason = pb.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_")
    return (
        f"{reason}: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.completion_tokens} completion tokens; queue {queue_ms:.0f} ms, "
        f"prefill {prefill_ms:.0f} ms, decode {seconds:.2f} s{rate}"
    )
