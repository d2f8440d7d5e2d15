"""A coordinator dies: requests go on with the next one, and their clients see a pause."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb

from tests.services.gateway.conftest import NOT_SERVING, SERVING, Setup, retry_delay_s
from tests.support import fake_coordinator
from tests.support.fake_coordinator import end, refusal, tokens

DEADLINE_S = 30.0
MAX_TOKENS = 6
# The mesh, a message for each token, and the end where it comes apart.
NUM_MESSAGES = 1 + MAX_TOKENS + 1


def make_request(*, first: int = 7, logprobs: bool = False) -> pb.GenerateRequest:
    sampling = pb.SamplingParameters(max_tokens=MAX_TOKENS, seed=5)
    if logprobs:
        sampling.logprobs = 0
    return pb.GenerateRequest(token_ids=[first, 8, 9], sampling=sampling)


async def answer(setup: Setup, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    call = setup.generation.Generate(request, timeout=DEADLINE_S)
    return [response async for response in call]


def facts(responses: list[pb.GenerateResponse]) -> tuple[object, ...]:
    """What must not depend on the coordinators that served a request."""
    last = responses[-1]
    return (
        "".join(response.text for response in responses),
        [token_id for response in responses for token_id in response.token_ids],
        [entry.chosen.token_id for response in responses for entry in response.logprobs],
        [response.finish_reason for response in responses if response.finish_reason],
        (last.usage.prompt_tokens, last.usage.completion_tokens),
    )


async def break_stream(setup: Setup) -> None:
    """The coordinator's process dies, and another takes its place."""
    coordinator = setup.coordinator
    following = coordinator.num_streams + 1
    coordinator.end_stream(grpc.StatusCode.UNAVAILABLE)
    # By now health says that the stream is lost, which may not be seen: it is soon good again.
    await asyncio.wait_for(coordinator.wait_for_stream(following), DEADLINE_S)
    await setup.wait_for_health(SERVING)


@pytest.mark.parametrize(("logprobs", "end_apart"), [(False, True), (True, False)])
async def test_wherever_a_stream_breaks_no_token_comes_twice_and_none_is_lost(
    setup: Setup, logprobs: bool, end_apart: bool
) -> None:
    setup.coordinator.script = partial(fake_coordinator.generate, end_apart=end_apart)
    requests = [make_request(first=first, logprobs=logprobs) for first in (1, 2)]
    undisturbed = [facts(await answer(setup, request)) for request in requests]
    for num_messages in range(1, 2 * NUM_MESSAGES):
        # The stream that is open knows of no break; those that follow do.
        setup.coordinator.breaks = [num_messages, 0, num_messages // 2]
        await break_stream(setup)
        answers = await asyncio.gather(*(answer(setup, request) for request in requests))
        assert [facts(responses) for responses in answers] == undisturbed, num_messages


async def test_what_is_submitted_again_is_what_is_left(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [tokens(65), tokens(66)]
    call = setup.generation.Generate(make_request(), timeout=DEADLINE_S)
    received = list((await call.read()).token_ids)
    setup.coordinator.script = lambda _: [end("LENGTH", 67)]
    await break_stream(setup)
    while received != [65, 66, 67]:
        received += (await call.read()).token_ids
    first, second = setup.coordinator.submissions
    assert list(second.token_ids) == [*first.token_ids, 65, 66]
    assert second.num_output_tokens == 2
    assert second.sampling == first.sampling
    assert second.traceparent == first.traceparent
    assert second.timeout.ToNanoseconds() < first.timeout.ToNanoseconds()


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"stop_token_ids": [66]}, "STOP"),
        ({}, "STOP"),
        ({"ignore_eos": True, "max_tokens": 2}, "LENGTH"),
        ({"max_tokens": 2, "stop_token_ids": [66]}, "STOP"),
    ],
)
async def test_a_request_whose_end_alone_was_lost_ends_without_another_coordinator(
    setup: Setup, sampling: dict[str, object], reason: str
) -> None:
    if sampling.get("stop_token_ids") is None:
        setup.coordinator.mesh.eos_token_ids.append(66)
        setup.coordinator.tell_mesh()
    setup.coordinator.script = lambda _: [tokens(65), tokens(66)]
    request = pb.GenerateRequest(token_ids=[1], sampling=pb.SamplingParameters(**sampling))
    call = setup.generation.Generate(request, timeout=DEADLINE_S)
    received = list((await call.read()).token_ids)
    while received != [65, 66]:
        received += (await call.read()).token_ids
    setup.coordinator.end_stream(grpc.StatusCode.UNAVAILABLE)
    last = await call.read()
    assert last.finish_reason == pb.FinishReason.Value(f"FINISH_REASON_{reason}")
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (1, 2)
    assert len(setup.coordinator.submissions) == 1


async def test_an_end_of_sequence_that_is_ignored_does_not_end_a_resumed_request(
    setup: Setup,
) -> None:
    setup.coordinator.mesh.eos_token_ids.append(65)
    setup.coordinator.tell_mesh()
    setup.coordinator.script = lambda _: [tokens(65)]
    sampling = pb.SamplingParameters(ignore_eos=True)
    request = pb.GenerateRequest(token_ids=[1], sampling=sampling)
    call = setup.generation.Generate(request, timeout=DEADLINE_S)
    await call.read()
    setup.coordinator.script = lambda _: [end("LENGTH", 66)]
    await break_stream(setup)
    assert list((await call.read()).token_ids) == [66]


async def test_durations_of_a_resumed_request_are_those_of_all_of_it(setup: Setup) -> None:
    resumed_ns: list[int] = []

    def resume(_: Any) -> list[Any]:
        resumed_ns.append(time.monotonic_ns())
        return [end("LENGTH", 66)]

    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.generation.Generate(make_request(), timeout=DEADLINE_S)
    await call.read()
    began_ns = time.monotonic_ns()
    setup.coordinator.script = resume
    await break_stream(setup)
    usage = (await call.read()).usage
    # The coordinator that ended it says 3 ms, and that 3 tokens of the prompt were cached.
    assert usage.decode_duration.ToNanoseconds() >= resumed_ns[0] - began_ns > 5_000_000
    assert usage.cached_tokens == 3


async def test_a_new_request_waits_for_the_next_coordinator(setup: Setup) -> None:
    await setup.coordinator.stop()
    await setup.wait_for_health(NOT_SERVING)
    answering = asyncio.create_task(answer(setup, make_request()))
    async with asyncio.timeout(DEADLINE_S):
        while not await asyncio.sleep(0.01, setup.gateway.requests.num_open):
            pass
    setup.coordinator.script = fake_coordinator.generate
    await setup.coordinator.start(setup.coordinator_port)
    responses = await asyncio.wait_for(answering, DEADLINE_S)
    assert responses[-1].usage.completion_tokens == MAX_TOKENS
    assert setup.coordinator.submissions[0].num_output_tokens == 0


async def test_requests_go_on_only_once_the_next_coordinator_can_serve(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.generation.Generate(make_request(), timeout=DEADLINE_S)
    await call.read()
    setup.coordinator.mesh.model.ready = False
    setup.coordinator.script = lambda _: [end("LENGTH", 66)]
    setup.coordinator.end_stream(grpc.StatusCode.UNAVAILABLE)
    await setup.coordinator.wait_for_stream(2)
    setup.coordinator.tell_mesh()
    assert len(setup.coordinator.submissions) == 1
    setup.coordinator.mesh.model.ready = True
    setup.coordinator.tell_mesh()
    assert list((await call.read()).token_ids) == [66]


async def test_a_request_that_is_cancelled_in_the_gap_is_not_resumed(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.generation.Generate(make_request(), timeout=DEADLINE_S)
    await call.read()
    await setup.coordinator.stop()
    await setup.wait_for_health(NOT_SERVING)
    call.cancel()
    await asyncio.wait_for(setup.gateway.requests.wait_until_idle(), DEADLINE_S)
    await setup.coordinator.start(setup.coordinator_port)
    await setup.wait_for_health(SERVING)
    assert len(setup.coordinator.submissions) == 1


async def test_a_deadline_that_passes_in_the_gap_ends_the_request(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.generation.Generate(make_request(), timeout=1.0)
    await call.read()
    await setup.coordinator.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(setup.gateway.requests.wait_until_idle(), DEADLINE_S)


async def test_a_request_that_one_coordinator_took_outlasts_the_full_queue_of_the_next(
    setup: Setup,
) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.generation.Generate(make_request(), timeout=DEADLINE_S)
    await call.read()
    scripts = [
        [refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_s=0)],
        [end("LENGTH", 66)],
    ]
    setup.coordinator.script = lambda _: scripts.pop(0)
    await break_stream(setup)
    assert list((await call.read()).token_ids) == [66]
    assert [s.num_output_tokens for s in setup.coordinator.submissions] == [0, 1, 1]


async def test_a_stop_string_found_before_the_loss_ends_the_request(setup: Setup) -> None:
    answer_ids = setup.tokenizer.encode("one STOP")
    setup.coordinator.script = lambda _: [tokens(*answer_ids)]
    setup.coordinator.answers_cancellations = False
    sampling = pb.SamplingParameters(stop=["STOP"])
    call = setup.generation.Generate(
        pb.GenerateRequest(token_ids=[1], sampling=sampling), timeout=DEADLINE_S
    )
    reading = asyncio.create_task(call.read())
    await asyncio.wait_for(setup.coordinator.cancelled.get(), DEADLINE_S)
    await break_stream(setup)
    last = await reading
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert len(setup.coordinator.submissions) == 1


class TestWithoutACoordinatorForTooLong:
    @pytest.fixture
    def resume_limit_s(self) -> float:
        return 0.5

    async def test_every_stream_ends_with_unavailable_and_new_requests_are_refused_at_once(
        self, setup: Setup
    ) -> None:
        setup.coordinator.script = lambda _: [tokens(65)]
        calls = [setup.generation.Generate(make_request(), timeout=DEADLINE_S) for _ in range(3)]
        for call in calls:
            await call.read()
        await setup.coordinator.stop()
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert retry_delay_s(caught.value) == 1.0
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be reached"):
            await answer(setup, make_request())
        listed = await setup.generation.ListModels(pb.ListModelsRequest())
        assert [(model.name, model.ready) for model in listed.models] == [("tiny", False)]

    async def test_a_coordinator_that_comes_later_is_found_again(self, setup: Setup) -> None:
        await setup.coordinator.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await answer(setup, make_request())
        setup.coordinator.script = fake_coordinator.generate
        await setup.coordinator.start(setup.coordinator_port)
        await setup.wait_for_health(SERVING)
        assert (await answer(setup, make_request()))[-1].usage.completion_tokens == MAX_TOKENS


@pytest.mark.parametrize("code", ["OK", "CANCELLED", "INTERNAL", "UNAVAILABLE"])
async def test_however_the_stream_ends_requests_go_on(setup: Setup, code: str) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.generation.Generate(make_request(), timeout=DEADLINE_S)
    await call.read()
    setup.coordinator.script = lambda _: [end("LENGTH", 66)]
    setup.coordinator.end_stream(grpc.StatusCode[code])
    assert list((await call.read()).token_ids) == [66]
