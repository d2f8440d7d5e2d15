"""GenerateMany: many requests in one stream, each answered as by Generate beside the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from penstock.v1 import coordinator_pb2
from penstock.v1 import generation_pb2 as pb

from core.errors import InvalidInput
from services.common.keys import KeyLimits, as_metadata
from services.gateway.caller import Caller, set_caller
from services.gateway.many_answers import MAX_REQUESTS_A_STREAM, ManyAnswers
from services.gateway.share import share_from
from tests.services.gateway.conftest import KeyedSetup, Setup, read_all, refusal_of
from tests.support.fake_coordinator import end, refusal, tokens

GENERATE_MANY = "/penstock.v1.GenerationService/GenerateMany"
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT


def numbered(number: int, prompt: str = "hello", **fields: Any) -> pb.GenerateManyRequest:
    request = pb.GenerateRequest(**{"prompt": prompt} | fields)
    return pb.GenerateManyRequest(id=number, request=request)


def cancellation(number: int) -> pb.GenerateManyRequest:
    return pb.GenerateManyRequest(id=number)


async def answers_to(
    setup: Setup, requests: Iterable[pb.GenerateManyRequest]
) -> dict[int, list[pb.ManyAnswer]]:
    """All answers of a call, by request."""
    call = setup.generation.GenerateMany(iter(requests), timeout=30)
    return by_request([response async for response in call])


def by_request(responses: Iterable[pb.GenerateManyResponse]) -> dict[int, list[pb.ManyAnswer]]:
    found: dict[int, list[pb.ManyAnswer]] = {}
    for response in responses:
        for answer in response.answers:
            found.setdefault(answer.id, []).append(answer)
    return found


def text_of(answers: Iterable[pb.ManyAnswer]) -> str:
    return "".join(answer.response.text for answer in answers)


def ends_with(answer: pb.ManyAnswer, reason: int) -> bool:
    return answer.response.finish_reason == reason and not answer.HasField("error")


async def test_each_request_is_answered_as_by_generate(setup: Setup) -> None:
    prompts = {7: "hello world 🎉", 0: "a", 2**64 - 1: "two words"}
    found = await answers_to(setup, [numbered(number, text) for number, text in prompts.items()])
    assert found.keys() == prompts.keys()
    for number, prompt in prompts.items():
        alone = await read_all(
            setup.generation.Generate(pb.GenerateRequest(prompt=prompt), timeout=30)
        )
        assert text_of(found[number]) == prompt
        assert [answer.response.finish_reason for answer in found[number][:-1]] == [0] * (
            len(found[number]) - 1
        )
        assert found[number][-1].response.finish_reason == pb.FINISH_REASON_LENGTH
        assert found[number][-1].response.usage == alone[-1].usage


async def test_what_comes_together_goes_out_together(setup: Setup) -> None:
    held = holding(setup)
    call = setup.generation.GenerateMany(timeout=30)
    for number in range(3):
        await call.write(numbered(number))
    ids = await take(held, 3)
    news = coordinator_pb2.ConnectResponse(token_request_ids=ids, token_ids=[65, 66, 67])
    setup.coordinator.send_message(news)
    response = await call.read()
    assert isinstance(response, pb.GenerateManyResponse)
    assert sorted(answer.response.token_ids[0] for answer in response.answers) == [65, 66, 67]
    assert sorted(answer.id for answer in response.answers) == [0, 1, 2]
    call.cancel()


def holding(setup: Setup, *updates: coordinator_pb2.RequestUpdate) -> asyncio.Queue[int]:
    """Has the coordinator answer each request so, and no further; the queue gets its number."""
    held = asyncio.Queue[int]()

    def script(submission: coordinator_pb2.Submission) -> Iterable[coordinator_pb2.RequestUpdate]:
        held.put_nowait(submission.request_id)
        return updates

    setup.coordinator.script = script
    return held


async def take(held: asyncio.Queue[int], count: int) -> list[int]:
    return [await asyncio.wait_for(held.get(), 30) for _ in range(count)]


async def test_an_error_ends_its_request_alone_and_has_details(setup: Setup) -> None:
    full = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", retry_s=2)
    setup.coordinator.script = lambda one: [full] if len(one.token_ids) > 1 else [end("LENGTH", 65)]
    wrong = numbered(1, sampling=pb.SamplingParameters(temperature=-1))
    found = await answers_to(setup, [wrong, numbered(2, "two words"), numbered(3, "a")])
    (invalid,), (refused,), (good,) = found[1], found[2], found[3]
    assert invalid.error.code == INVALID_ARGUMENT.value[0]
    bad_request = detail(invalid, error_details_pb2.BadRequest)
    assert bad_request.field_violations[0].field == "sampling.temperature"
    assert refused.error.message == "the queue is full"
    assert detail(refused, error_details_pb2.RetryInfo).retry_delay.seconds == 2
    assert ends_with(good, pb.FINISH_REASON_LENGTH)


def detail(answer: pb.ManyAnswer, kind: type[Any]) -> Any:
    found = kind()
    assert any(packed.Unpack(found) for packed in answer.error.details), answer
    return found


async def test_a_cancelled_request_ends_and_its_number_is_free(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.generation.GenerateMany(timeout=30)
    await call.write(numbered(4))
    assert (await read_one(call)).response.token_ids == [65]
    await call.write(cancellation(4))
    assert ends_with(await read_one(call), pb.FINISH_REASON_CANCELLED)
    cancelled = await asyncio.wait_for(setup.coordinator.cancelled.get(), 30)
    assert cancelled == setup.coordinator.submissions[0].request_id
    setup.coordinator.script = lambda _: [end("LENGTH", 66)]
    await call.write(numbered(4))
    assert ends_with(await read_one(call), pb.FINISH_REASON_LENGTH)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def read_one(call: Any) -> pb.ManyAnswer:
    """The next message, which has one answer."""
    (answer,) = (await call.read()).answers
    return answer


async def test_a_request_that_is_cancelled_at_once_ends_too(setup: Setup) -> None:
    setup.coordinator.script = lambda _: []
    found = await answers_to(setup, [numbered(1), cancellation(1)])
    assert ends_with(found[1][-1], pb.FINISH_REASON_CANCELLED)


async def test_what_has_ended_or_never_was_is_not_cancelled(setup: Setup) -> None:
    call = setup.generation.GenerateMany(timeout=30)
    await call.write(numbered(1, "a"))
    responses = [await call.read()]
    while not responses[-1].answers[-1].response.finish_reason:  # type: ignore[union-attr]
        responses.append(await call.read())
    await call.write(cancellation(1))
    await call.write(cancellation(99))
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_bytes_that_are_no_request_end_the_stream_after_what_came_before(
    setup: Setup,
) -> None:
    call = setup.channel.stream_stream(
        GENERATE_MANY, response_deserializer=pb.GenerateManyResponse.FromString
    )(iter([numbered(1, "a").SerializeToString(), b"\x12\x7fcut"]), timeout=30)
    responses: list[pb.GenerateManyResponse] = []
    while not (responses and responses[-1].answers[-1].response.finish_reason):
        responses.append(await call.read())
    assert text_of(by_request(responses)[1]) == "a"
    assert (await refusal_of(call.read())).code() is INVALID_ARGUMENT


async def test_a_call_that_is_cancelled_cancels_its_requests(setup: Setup) -> None:
    held = holding(setup, tokens(65))
    call = setup.generation.GenerateMany(timeout=30)
    for number in range(3):
        await call.write(numbered(number))
    ids = await take(held, 3)
    call.cancel()
    cancelled = {await asyncio.wait_for(setup.coordinator.cancelled.get(), 30) for _ in range(3)}
    assert cancelled == set(ids)


async def test_a_request_has_its_own_deadline_or_the_calls(setup: Setup) -> None:
    short, long, own = numbered(1), numbered(2), numbered(3)
    short.timeout.FromSeconds(5)
    long.timeout.FromSeconds(1000)
    await answers_to(setup, [short, long, own])
    times = sorted(one.timeout.ToMilliseconds() for one in setup.coordinator.submissions)
    # gRPC rounds deadlines up on the wire.
    assert times[0] == 5000
    assert all(20_000 < time <= 31_000 for time in times[1:])


@pytest.mark.parametrize(("whole", "nanos"), [(0, 0), (-3, 0), (10**17, 0), (0, -1)])
async def test_a_timeout_that_cannot_be_right_is_refused(
    setup: Setup, whole: int, nanos: int
) -> None:
    request = numbered(1)
    request.timeout.seconds, request.timeout.nanos = whole, nanos
    ((answer,),) = (await answers_to(setup, [request])).values()
    assert answer.error.code == INVALID_ARGUMENT.value[0]
    assert detail(answer, error_details_pb2.BadRequest).field_violations[0].field == "timeout"


async def test_requests_of_one_call_count_one_by_one(keyed: KeyedSetup) -> None:
    key = keyed.make_key(limits=KeyLimits(max_streams=1))
    keyed.setup.coordinator.script = lambda _: [tokens(65)]
    call = keyed.setup.generation.GenerateMany(timeout=30, metadata=as_metadata(key))
    fitting = pb.SamplingParameters(max_tokens=8)
    await call.write(numbered(1, sampling=fitting))
    assert (await read_one(call)).response.token_ids == [65]
    await call.write(numbered(2, sampling=fitting))
    refused = await read_one(call)
    assert (refused.id, refused.error.code) == (2, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert "allowed: 1" in refused.error.message
    call.cancel()


class _Gated:
    """Stands for the gateway's generator: answers once `gate` is open, counts what it is asked."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.num_asked = 0

    async def generate(
        self, request: pb.GenerateRequest, **_: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.num_asked += 1
        await self.gate.wait()
        yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_LENGTH)


class _Context:
    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()


def many_answers(generator: Any) -> ManyAnswers:
    set_caller(Caller(share=share_from(())))
    context: Any = _Context()
    return ManyAnswers(generator, context)


async def test_a_number_in_use_ends_the_stream_after_what_came_before() -> None:
    generator = _Gated()

    async def requests() -> AsyncIterator[pb.GenerateManyRequest]:
        yield numbered(1)
        yield numbered(2)
        await asyncio.sleep(0)  # they begin, and wait
        generator.gate.set()
        yield numbered(1)
        yield numbered(3)

    responses: list[pb.GenerateManyResponse] = []

    async def read() -> None:
        async for response in many_answers(generator).responses(requests()):
            responses.append(response)

    with pytest.raises(InvalidInput, match=r"^id is 1; allowed: an id that no open request"):
        await read()
    found = by_request(responses)
    assert sorted(found) == [1, 2]
    assert all(ends_with(last, pb.FINISH_REASON_LENGTH) for (last,) in found.values())


async def test_a_client_that_does_not_read_is_not_read_from() -> None:
    generator = _Gated()
    generator.gate.set()
    total = 3 * MAX_REQUESTS_A_STREAM

    async def requests() -> AsyncIterator[pb.GenerateManyRequest]:
        for number in range(total):
            yield numbered(number)

    responses = many_answers(generator).responses(requests())
    first = await anext(responses)  # and while it is on its way:
    for _ in range(20):
        await asyncio.sleep(0)
    assert generator.num_asked == MAX_REQUESTS_A_STREAM
    found = by_request([first, *[response async for response in responses]])
    assert sorted(found) == list(range(total))
