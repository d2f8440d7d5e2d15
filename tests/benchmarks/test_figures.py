"""The benchmark's own arithmetic: what it reports is what happened."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise, repeat

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)

from tests.benchmarks.load import LoadGenerator, Request, Tally, answers_of, make_request
from tests.benchmarks.measurements import Bench, traced_requests
from tests.benchmarks.meters import STARVATION_CAUSES, ProcessReading
from tests.benchmarks.report import make_figures
from tests.benchmarks.systems import System
from tests.benchmarks.trace import TracedRequest, clip, read_trace, scale


class EchoMesh(GenerationServiceServicer):
    """Answers with as many tokens as asked for, two in a message."""

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        if request.sampling.max_tokens == 13:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "unlucky")
        left = request.sampling.max_tokens
        while left:
            count = min(2, left)
            left -= count
            yield pb.GenerateResponse(token_ids=[1] * count)
        yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_LENGTH)

    async def GenerateMany(
        self,
        request_iterator: AsyncIterator[pb.GenerateManyRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.GenerateManyResponse]:
        async for message in request_iterator:
            if message.request.sampling.max_tokens == 13:
                error = pb.RequestError(code=14, message="unlucky")
                failed = pb.ManyAnswer(id=message.id, error=error)
                yield pb.GenerateManyResponse(answers=[failed])
            elif message.HasField("request"):
                async for response in self.Generate(message.request, context):
                    answer = pb.ManyAnswer(id=message.id, response=response)
                    yield pb.GenerateManyResponse(answers=[answer])


@pytest.fixture(params=[False, True], ids=["a call each", "one call"])
async def generator(request: pytest.FixtureRequest) -> AsyncIterator[LoadGenerator]:
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(EchoMesh(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        answers_of(channel, one_call=request.param) as answers,
    ):
        yield LoadGenerator(answers)
    await server.stop(None)


def request(num_new_tokens: int, *, at_s: float = 0.0):
    rng = random.Random(1)
    lengths = {"num_prompt_tokens": 5, "num_new_tokens": num_new_tokens}
    return make_request(rng, vocab_size=100, **lengths, at_s=at_s)


async def test_a_closed_loop_counts_every_token_once(generator: LoadGenerator) -> None:
    workers = [iter([request(7), request(8)]) for _ in range(3)]
    await generator.closed_loop(workers, until_s=time.monotonic() + 60)
    tally = generator.tally
    assert sum(tally.token_counts) == 3 * (7 + 8)
    assert len(tally.first_token_s) == len(tally.ended_at_s) == 6
    assert len(tally.gap_s) == 3 * (7 + 8) - 6
    assert list(tally.prompt_tokens) == [5] * 6
    assert not tally.errors


async def test_a_closed_loop_ends_at_its_time_in_the_middle_of_an_answer(
    generator: LoadGenerator,
) -> None:
    async with asyncio.timeout(30):
        await generator.closed_loop([repeat(request(4))], until_s=time.monotonic() + 0.2)
    assert generator.tally.ended_at_s


async def test_an_open_loop_counts_waiting_from_the_due_time(generator: LoadGenerator) -> None:
    await generator.open_loop([request(2, at_s=at_s) for at_s in (0.0, 0.0, 0.05)])
    tally = generator.tally
    assert len(tally.first_token_s) == 3
    assert tally.first_token_at_s[2] - tally.first_token_s[2] >= (
        min(tally.first_token_at_s[i] - tally.first_token_s[i] for i in (0, 1)) + 0.05
    )


async def test_an_error_is_kept_and_ends_its_client(generator: LoadGenerator) -> None:
    worker = iter([request(13), request(2)])
    await generator.closed_loop([worker], until_s=time.monotonic() + 60)
    assert generator.tally.errors == ["UNAVAILABLE: unlucky"]
    assert not generator.tally.token_counts


def test_figures_count_only_what_lies_within_the_measurement() -> None:
    tally = Tally()
    for at_s, count in ((9.0, 100), (10.0, 1), (11.0, 2), (12.0, 100)):
        tally.token_times_s.append(at_s)
        tally.token_counts.append(count)
    for at_s, seconds in ((9.0, 9.0), (11.0, 0.5)):
        tally.first_token_at_s.append(at_s)
        tally.first_token_s.append(seconds)
        tally.prompt_tokens.append(40)
    tally.gap_at_s.extend([10.5, 11.5, 12.0])
    tally.gap_s.extend([0.010, 0.020, 9.0])
    before = ProcessReading(
        name="stage-0", cpu_s=1.0, peak_memory_bytes=5, stage_s={"busy": 1.0, "starved": 0.0}
    )
    after = replace(before, cpu_s=1.5, stage_s={"busy": 2.0, "starved": 0.5})
    for reading in (before, after):
        others = [f"starved_{cause}" for cause in STARVATION_CAUSES]
        reading.stage_s.update(dict.fromkeys(("stolen", "wire", "serialise", *others), 0.0))
    figures = make_figures("a load", tally, from_s=10.0, to_s=12.0, before=[before], after=[after])
    assert figures.tokens_per_s == pytest.approx(3 / 2)
    assert figures.prompt_tokens_per_s == pytest.approx(20)
    assert figures.ttft_p50_ms == pytest.approx(500)
    assert figures.inter_token_p50_ms == pytest.approx(15)
    assert figures.stages[0].busy == pytest.approx(0.5)
    assert figures.stages[0].starved == pytest.approx(0.25)
    assert figures.cpu_us_per_token == {"stage-0": pytest.approx(0.5e6 / 3)}


def test_the_trace_is_read_as_published() -> None:
    requests = read_trace()
    assert len(requests) == 19366
    assert (requests[0].num_prompt_tokens, requests[0].num_new_tokens) == (374, 44)
    assert requests[1].at_s == pytest.approx(4.314579, abs=1e-6)
    assert all(one.at_s <= two.at_s for one, two in pairwise(requests))


def test_clipping_fits_the_context_and_says_how_much_it_changed() -> None:
    requests, share = clip(read_trace(), context_length=2048)
    assert all(one.num_prompt_tokens >= 1 for one in requests)
    assert all(one.num_prompt_tokens + one.num_new_tokens <= 2048 for one in requests)
    assert 0.1 < share < 0.2


def test_scaling_keeps_the_pattern_and_sets_the_rate() -> None:
    requests = [
        TracedRequest(at_s=at_s, num_prompt_tokens=1, num_new_tokens=1) for at_s in (5, 6, 9)
    ]
    assert [one.at_s for one in scale(requests, requests_per_s=2)] == pytest.approx([0, 0.25, 1])


async def test_requests_of_the_trace_arrive_at_the_rate() -> None:
    """Though the trace's first minute is emptier than others."""

    async def answers(_: Request) -> AsyncIterator[int]:
        yield 1

    system = System(name="echo", address="")
    bench = Bench(system=system, answers=answers, vocab_size=100, context_length=64)
    traced, _ = traced_requests(bench.context_length)
    figures = await bench.arriving(traced[:20], requests_per_s=200.0)
    assert figures.requests == 20
    assert figures.duration_s > 0.09
