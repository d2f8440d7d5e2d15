"""What a key's limits refuse, through the public API; test_quota.py has how they are counted."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from penstock.v1 import generation_pb2 as pb

from services.common.keys import KeyLimits, as_metadata
from tests.services.gateway.conftest import (
    KeyedSetup,
    detail,
    read_all,
    refusal_of,
    retry_delay_s,
)
from tests.services.gateway.test_inference import infer_request
from tests.support.fake_coordinator import end, refusal, tokens

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def sampling(max_tokens: int) -> pb.SamplingParameters:
    return pb.SamplingParameters(max_tokens=max_tokens)


async def test_one_stream_too_many_is_refused_until_another_ends(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(max_streams=1))
    coordinator = keyed.setup.coordinator
    coordinator.script = lambda _: [tokens(65)]
    first = keyed.generate(key)
    await first.read()
    error = await refusal_of(keyed.generate(key))
    assert error.code() is EXHAUSTED
    assert retry_delay_s(error) == 1.0
    (violation,) = detail(error, error_details_pb2.QuotaFailure).violations
    assert violation.subject == f"key {key.split('_')[1]}"
    assert "allowed: 1" in violation.description
    coordinator.send(coordinator.submissions[0].request_id, end("LENGTH", 66))
    assert (await first.read()).finish_reason == pb.FINISH_REASON_LENGTH
    assert await first.read() is grpc.aio.EOF
    coordinator.script = lambda _: [end("LENGTH", 65)]
    assert await read_all(keyed.generate(key))


async def test_requests_of_one_inference_stream_count_one_by_one(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(max_streams=1))
    keyed.setup.coordinator.script = lambda _: [tokens(65)]
    inference = keyed.setup.inference
    stream = inference.ModelStreamInfer(timeout=30, metadata=as_metadata(key))
    for _ in range(2):
        await stream.write(infer_request("hello"))
    assert "allowed: 1" in (await stream.read()).error_message
    unary = inference.ModelInfer(infer_request("hello"), metadata=as_metadata(key))
    assert (await refusal_of(unary)).code() is EXHAUSTED
    stream.cancel()


async def test_a_stream_that_is_cancelled_does_not_count_any_more(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(max_streams=1))
    coordinator = keyed.setup.coordinator
    coordinator.script = lambda _: [tokens(65)]
    first = keyed.generate(key)
    await first.read()
    first.cancel()
    await coordinator.cancelled.get()
    coordinator.script = lambda _: [end("LENGTH", 65)]
    assert await read_all(keyed.generate(key))


async def test_tokens_beyond_the_minutes_are_refused_with_a_time(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(tokens_per_minute=60))
    ids = [65] * 20
    # 20 of the prompt, and 20 that are generated of 30 reserved.
    assert await read_all(keyed.generate(key, prompt="", token_ids=ids, sampling=sampling(30)))
    error = await refusal_of(keyed.generate(key, prompt="", token_ids=ids, sampling=sampling(30)))
    assert error.code() is EXHAUSTED
    # 20 are left of 60, or a few more by now; 50 are wanted; one comes each second.
    delay_s = retry_delay_s(error)
    assert delay_s is not None
    assert 0 < delay_s <= 30
    assert detail(error, error_details_pb2.QuotaFailure).violations[0].subject.startswith("key ")
    assert len(keyed.setup.coordinator.submissions) == 1


async def test_what_the_mesh_refuses_is_not_counted(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(tokens_per_minute=60))
    keyed.setup.coordinator.script = lambda _: [refusal(EXHAUSTED, "full", retry_s=1)]
    for _ in range(3):
        call = keyed.generate(key, prompt="", token_ids=[65] * 20, sampling=sampling(30))
        assert (await refusal_of(call)).details() == "full"


@pytest.mark.parametrize(
    ("fields", "field", "seen", "allowed"),
    [
        ({"sampling": sampling(11)}, "sampling.max_tokens", "11", "1 to 10"),
        ({"prompt": "", "token_ids": [65] * 21}, "token_ids", "21 tokens", "1 to 20 tokens"),
        ({"prompt": "x y " * 30}, "prompt", "tokens", "1 to 20 tokens"),
        ({"prompt": "x" * 100_000}, "prompt", "100000 characters", "at most 20 tokens"),
    ],
)
async def test_a_request_above_the_keys_maxima_names_both(
    keyed: KeyedSetup, fields: dict[str, object], field: str, seen: str, allowed: str
) -> None:
    key = keyed.make_key(limits=KeyLimits(max_prompt_tokens=20, max_output_tokens=10))
    error = await refusal_of(keyed.generate(key, **fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
    assert violation.field == field
    assert seen in violation.description
    assert allowed in violation.description
    assert not keyed.setup.coordinator.submissions


async def test_a_request_at_the_keys_maxima_is_answered(keyed: KeyedSetup) -> None:
    limits = KeyLimits(max_prompt_tokens=20, max_output_tokens=10, tokens_per_minute=30)
    key = keyed.make_key(limits=limits)
    call = keyed.generate(key, prompt="", token_ids=[65] * 20, sampling=sampling(10))
    assert await read_all(call)


async def test_the_default_of_max_tokens_follows_the_key(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(max_output_tokens=10))
    await read_all(keyed.generate(key, sampling=None))
    assert keyed.setup.coordinator.submissions[0].sampling.max_tokens == 10


async def test_more_than_a_minutes_tokens_at_once_never_pass_and_say_so(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(tokens_per_minute=30))
    call = keyed.generate(key, prompt="", token_ids=[65] * 20, sampling=sampling(11))
    error = await refusal_of(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
    assert "31" in violation.description
    assert "30" in violation.description
