"""Bad requests: each gets the status and the details that say what is wrong; nothing breaks."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from penstock.v1 import generation_pb2 as pb

from tests.services.gateway.conftest import Setup

Sampling = pb.SamplingParameters
GENERATE = "/penstock.v1.GenerationService/Generate"


@pytest.fixture(autouse=True)
async def still_serving(setup: Setup) -> AsyncIterator[None]:
    """Whatever a test sent: the next good request is served, and nothing bad got through."""
    yield
    call = setup.generation.Generate(pb.GenerateRequest(prompt="good"), timeout=30)
    responses = [response async for response in call]
    assert "".join(response.text for response in responses) == "good"
    assert len(setup.coordinator.submissions) == 1


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def violation(error: grpc.aio.AioRpcError) -> Any:
    """The one field violation among a status's details."""
    status = rpc_status.from_call(error)
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert [detail for detail in status.details if detail.Unpack(bad)]
    (found,) = bad.field_violations
    return found


BAD_REQUESTS = [
    ({}, "prompt", "exactly one of prompt, messages and token_ids"),
    ({"prompt": ""}, "prompt", "value 'not set'; allowed: exactly one of"),
    ({"prompt": "a", "token_ids": [1]}, "prompt", "'set together with token_ids'; allowed: exac"),
    ({"messages": [{"role": "user"}], "token_ids": [1]}, "messages", "exactly one of"),
    ({"prompt": "x" * 200}, "prompt", "1 to 199 tokens"),
    ({"prompt": "x" * 100_000}, "prompt", "at most 199 tokens"),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "1 to 199 tokens"),
    ({"token_ids": [1] * 200}, "token_ids", "1 to 199 tokens"),
    ({"token_ids": [1, 300]}, "token_ids[1]", "0 to 299"),
    ({"token_ids": [2**32 - 1]}, "token_ids[0]", "0 to 299"),
    ({"messages": [{"role": "root", "content": "a"}]}, "messages[0].role", "system, user"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "system, user"),
]
BAD_SAMPLING = [
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 200}, "max_tokens", "1 to 199"),
    ({"max_tokens": 2**32 - 1}, "max_tokens", "1 to 199"),
    ({"temperature": math.nan}, "temperature", "[0, 100]"),
    ({"temperature": math.inf}, "temperature", "[0, 100]"),
    ({"temperature": -0.1}, "temperature", "[0, 100]"),
    ({"temperature": 100.1}, "temperature", "[0, 100]"),
    ({"top_p": 0.0}, "top_p", "(0, 1]"),
    ({"top_p": math.nan}, "top_p", "(0, 1]"),
    ({"top_p": 1.1}, "top_p", "(0, 1]"),
    ({"min_p": -0.1}, "min_p", "[0, 1]"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "(0, 100]"),
    ({"presence_penalty": 101.0}, "presence_penalty", "[-100, 100]"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty", "[-100, 100]"),
    ({"logprobs": 21}, "logprobs", "0 to 20"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ["a", ""]}, "stop[1]", "1 to 256 bytes"),
    ({"stop": ["é" * 129]}, "stop[0]", "1 to 256 bytes"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64"),
    ({"stop_token_ids": [300]}, "stop_token_ids[0]", "0 to 299"),
]


@pytest.mark.parametrize(("fields", "field", "allowed"), BAD_REQUESTS)
async def test_a_wrong_request_is_refused(
    setup: Setup, fields: dict[str, Any], field: str, allowed: str
) -> None:
    error = await refused(setup.generation.Generate(pb.GenerateRequest(**fields)).read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violation(error).field == field
    assert allowed in violation(error).description


@pytest.mark.parametrize(("fields", "field", "allowed"), BAD_SAMPLING)
async def test_wrong_sampling_is_refused(
    setup: Setup, fields: dict[str, Any], field: str, allowed: str
) -> None:
    request = pb.GenerateRequest(prompt="a", sampling=Sampling(**fields))
    error = await refused(setup.generation.Generate(request).read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violation(error).field == f"sampling.{field}"
    assert allowed in violation(error).description


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Detokenize"])
async def test_an_unknown_model_is_not_found(setup: Setup, method: str) -> None:
    request = getattr(pb, f"{method}Request")(model="gpt-7")
    call = getattr(setup.generation, method)(request)
    error = await refused(call.read() if method == "Generate" else call)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'gpt-7'" in (error.details() or "")
    assert violation(error).field == "model"


async def test_tokenize_and_detokenize_refuse_what_generate_would(setup: Setup) -> None:
    error = await refused(setup.generation.Tokenize(pb.TokenizeRequest()))
    assert violation(error).field == "prompt"
    both = pb.TokenizeRequest(prompt="a", messages=[pb.ChatMessage(role="user")])
    assert violation(await refused(setup.generation.Tokenize(both))).field == "prompt"
    ids = pb.DetokenizeRequest(token_ids=[0, 300])
    assert violation(await refused(setup.generation.Detokenize(ids))).field == "token_ids[1]"


@pytest.mark.parametrize(
    "data",
    [
        b"\x12\x02\xff\xfe",  # field 2 (prompt), two bytes that are no UTF-8
        b"\x1a\x04\x12\x02\xc3\x28",  # messages[0].content
        b"\x2a\x03\x52\x01\xff",  # sampling.stop[0]
        b"\x12\xff\xff",  # cut short
    ],
)
async def test_bytes_that_are_no_request_are_refused(setup: Setup, data: bytes) -> None:
    call = setup.channel.unary_stream(GENERATE)(data)
    error = await refused(call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violation(error).field == "request"
    assert "UTF-8" in violation(error).description


async def test_a_message_of_100_megabytes_is_refused(setup: Setup) -> None:
    request = pb.GenerateRequest(prompt="x" * 100_000_000)
    error = await refused(setup.generation.Generate(request).read())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_unknown_method_is_unimplemented(setup: Setup) -> None:
    call = setup.channel.unary_unary("/penstock.v1.GenerationService/Nothing")(b"")
    assert (await refused(call)).code() is grpc.StatusCode.UNIMPLEMENTED
