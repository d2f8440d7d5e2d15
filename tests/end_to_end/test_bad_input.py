"""Whatever a client sends, it gets a status that says what was wrong, and the mesh goes on.

That it goes on is checked after each test by the `client` fixture.
"""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb

from tests.support.client import Client, field_violations, make_request

GENERATE = "/penstock.v1.GenerationService/Generate"
INVALID = grpc.StatusCode.INVALID_ARGUMENT

WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": "a", "token_ids": [1]}, "prompt"),
    ({"prompt": "a", "chat": "b"}, "prompt"),
    ({"messages": [pb.ChatMessage(role="robot", content="x")]}, "messages[0].role"),
    ({"token_ids": [49152]}, "token_ids[0]"),
    ({"token_ids": [1, 2**32 - 1]}, "token_ids[1]"),
    ({"token_ids": [1000] * 9000}, "token_ids"),
    ({"prompt": "word " * 20000}, "prompt"),
    ({"prompt": "x" * 3_000_000}, "prompt"),
    ({"chat": "word " * 20000}, "messages"),
]
WRONG_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**32 - 1}, "max_tokens"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
    ({"min_p": -1.0}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": math.inf}, "presence_penalty"),
    ({"frequency_penalty": -101.0}, "frequency_penalty"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x" * 257]}, "stop[0]"),
    ({"stop_token_ids": [49152]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
]


def refusal(client: Client, request: pb.GenerateRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        client.send(request)
    return caught.value


@pytest.mark.parametrize(("fields", "field"), WRONG_FIELDS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(client: Client, fields: dict[str, Any], field: str) -> None:
    error = refusal(client, make_request(**fields))
    assert error.code() is INVALID
    assert field_violations(error) == [field]


@pytest.mark.parametrize(("sampling", "field"), WRONG_SAMPLING, ids=lambda value: str(value)[:40])
def test_a_wrong_sampling_parameter_is_named(
    client: Client, sampling: dict[str, Any], field: str
) -> None:
    error = refusal(client, make_request(prompt="a", sampling=sampling))
    assert error.code() is INVALID
    assert field_violations(error) == [f"sampling.{field}"]
    assert "allowed: " in error.details()


def test_an_unknown_model_is_not_found_and_the_message_names_those_there_are(
    client: Client,
) -> None:
    error = refusal(client, make_request(model="gpt-17", prompt="a"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "smollm2-135m-instruct" in error.details()


def send_bytes(client: Client, message: bytes) -> grpc.RpcError:
    call = client.channel.unary_stream(GENERATE)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(message, timeout=60))
    return caught.value


def test_invalid_utf_8_is_an_invalid_argument(client: Client) -> None:
    prompt_of_two_bytes = b"\x12\x02\xff\xfe"
    assert send_bytes(client, prompt_of_two_bytes).code() is INVALID


def test_bytes_that_are_no_message_are_an_invalid_argument(client: Client) -> None:
    assert send_bytes(client, b"\xff" * 100).code() is INVALID


def test_a_message_of_100_megabytes_is_refused(client: Client) -> None:
    error = send_bytes(client, make_request(prompt="x" * 100_000_000).SerializeToString())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    call = client.channel.unary_unary("/penstock.v1.GenerationService/Guess")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_bad_and_good_requests_at_the_same_time_do_not_disturb_each_other(client: Client) -> None:
    good = make_request(prompt="Once upon a time", sampling={"max_tokens": 16, "temperature": 0})
    before = client.send(good).token_ids
    calls = [client.generation.Generate(good) for _ in range(4)]
    for sampling, _ in WRONG_SAMPLING:
        refusal(client, make_request(prompt="a", sampling=sampling))
    for call in calls:
        assert [token_id for response in call for token_id in response.token_ids] == before
