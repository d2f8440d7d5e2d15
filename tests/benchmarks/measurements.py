"""The measurements: closed loop with short requests, and a real trace in open loop."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grpc.aio
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.common.channels import open_public_channel
from tests.benchmarks.load import (
    Answers,
    Encode,
    LoadGenerator,
    Request,
    answers_of,
    encode_grpc,
    make_request,
)
from tests.benchmarks.meters import read_processes
from tests.benchmarks.report import Figures, make_figures
from tests.benchmarks.systems import System
from tests.benchmarks.trace import TracedRequest, clip, read_trace, scale

SEED = 20231116
NEW_TOKENS = 128
PROMPT_TOKENS = (16, 64)
WARM_UP_S = 3.0
SATURATING_CLIENTS = 32
OPEN_LOOP_SHARE = 0.8
PREFILL_CLIENTS = 8
PREFILL_REQUEST = TracedRequest(at_s=0.0, num_prompt_tokens=1024, num_new_tokens=1)
# The trace is long; this many requests have its mix of lengths.
TRACE_REQUESTS = 2000
# For measurements that end by number of requests.
LONGEST_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how. With `requests`, a closed loop ends after so many, not after
    `seconds`."""

    streams: tuple[int, ...]
    seconds: float
    requests: int | None
    open_loop_seconds: float
    one_call: bool = False  # for all requests, GenerateMany, instead of one for each


class Measured(NamedTuple):
    """All figures of a mesh, and the number format that it computes in."""

    number_format: str
    figures: list[Figures]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A system under load: how to ask it, and how long its vocabulary and context are."""

    system: System
    answers: Answers
    vocab_size: int
    context_length: int
    number_format: str = ""
    encode: Encode = encode_grpc

    async def closed(self, num_streams: int, plan: Plan) -> Figures:
        """`num_streams` clients with short prompts. Unless the number of requests is given, the
        first answers are cut to random lengths, so that the clients do not march in step."""
        workers = [self._short(client, num_streams, plan) for client in range(num_streams)]
        seconds = None if plan.requests else plan.seconds
        return await self._run(workers, load=f"{num_streams} streams", seconds=seconds)

    async def prefill(self, seconds: float) -> Figures:
        """A few clients with long prompts and one new token each."""
        load = f"prompts of {PREFILL_REQUEST.num_prompt_tokens:,}"
        endless = self._requests(itertools.repeat(PREFILL_REQUEST), load)
        return await self._run([endless] * PREFILL_CLIENTS, load=load, seconds=seconds)

    async def saturated(self, traced: Sequence[TracedRequest], seconds: float) -> Figures:
        """The trace's lengths, with as many clients as keep the system full."""
        load = "trace, saturated"
        workers = [self._requests(itertools.cycle(traced), load)] * SATURATING_CLIENTS
        return await self._run(workers, load=load, seconds=seconds)

    async def arriving(self, traced: Sequence[TracedRequest], *, requests_per_s: float) -> Figures:
        """The trace's lengths and pattern of arrivals, at this mean rate."""
        due = scale(traced, requests_per_s=requests_per_s)
        load = f"trace, {requests_per_s:.2f} requests/s"
        requests = list(self._requests(due, load))
        generator = LoadGenerator(self.answers)
        return await self._measured(generator, generator.open_loop(requests), load)

    async def _run(
        self, workers: Sequence[Iterator[Request]], *, load: str, seconds: float | None
    ) -> Figures:
        """A closed loop: after a warm-up that is not counted for `seconds`, or to its end."""
        generator = LoadGenerator(self.answers)
        warm_up_s = 0.0 if seconds is None else WARM_UP_S
        limit_s = LONGEST_S if seconds is None else warm_up_s + seconds
        until_s = time.monotonic() + limit_s
        running = asyncio.create_task(generator.closed_loop(workers, until_s=until_s))
        await asyncio.sleep(warm_up_s)
        return await self._measured(generator, running, load)

    async def _measured(
        self, generator: LoadGenerator, running: Awaitable[None], load: str
    ) -> Figures:
        """Figures from now until `running` has ended."""
        before, from_s = read_processes(self.system.processes), time.monotonic()
        await running
        to_s, after = time.monotonic(), read_processes(self.system.processes)
        return make_figures(
            load, generator.tally, from_s=from_s, to_s=to_s, before=before, after=after
        )

    def _requests(self, lengths: Iterable[TracedRequest], load: str) -> Iterator[Request]:
        """Requests of these lengths; each load has prompts of its own, or they would be found in
        a cache of prefixes."""
        for number, one in enumerate(lengths):
            yield make_request(
                random.Random(f"{SEED} {load} {number}"),
                vocab_size=self.vocab_size,
                num_prompt_tokens=one.num_prompt_tokens,
                num_new_tokens=one.num_new_tokens,
                at_s=one.at_s,
                encode=self.encode,
            )

    def _short(self, client: int, num_streams: int, plan: Plan) -> Iterator[Request]:
        """One client's requests: endless, or its part of `plan.requests`."""
        rng = random.Random(f"{SEED} {num_streams} {client}")
        total = plan.requests
        turns = itertools.count() if total is None else range(client, total, num_streams)
        for turn, _ in enumerate(turns):
            staggered = turn == 0 and total is None
            yield make_request(
                rng,
                vocab_size=self.vocab_size,
                num_prompt_tokens=rng.randint(*PROMPT_TOKENS),
                num_new_tokens=rng.randint(1, NEW_TOKENS) if staggered else NEW_TOKENS,
                encode=self.encode,
            )


async def mesh_bench(system: System, channel: grpc.aio.Channel, *, answers: Answers) -> Bench:
    """For a mesh of ours, which is asked for its sizes."""
    listed = await GenerationServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=30)
    model = listed.models[0]
    return Bench(
        system=system,
        answers=answers,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        number_format=model.number_format,
    )


def traced_requests(context_length: int) -> tuple[list[TracedRequest], float]:
    """The trace's first requests, clipped to a context, and the share that was clipped."""
    return clip(read_trace(limit=TRACE_REQUESTS), context_length=context_length)


async def measure(system: System, plan: Plan, *, say: Callable[[str], None]) -> Measured:
    """All measurements, one after another, over one channel."""
    async with (
        open_public_channel(system.address, ca=system.ca) as channel,
        answers_of(channel, one_call=plan.one_call) as answers,
    ):
        bench = await mesh_bench(system, channel, answers=answers)
        say(f"number format: {bench.number_format}")
        figures = []
        for num_streams in plan.streams:
            figures.append(await bench.closed(num_streams, plan))
            say(f"{figures[-1].load}: {figures[-1].tokens_per_s:.0f} tokens/s")
        if plan.open_loop_seconds:
            figures.append(await bench.prefill(plan.seconds))
            say(f"{figures[-1].load}: {figures[-1].prompt_tokens_per_s:.0f} prompt tokens/s")
            figures += await _trace(bench, plan.open_loop_seconds, say)
        return Measured(bench.number_format, figures)


async def _trace(bench: Bench, seconds: float, say: Callable[[str], None]) -> list[Figures]:
    """The trace at saturation, then its arrivals at a share of that rate."""
    traced, share = traced_requests(bench.context_length)
    say(f"trace: {share:.1%} of requests clipped to {bench.context_length} tokens")
    saturated = await bench.saturated(traced, seconds)
    rate = OPEN_LOOP_SHARE * saturated.requests / saturated.duration_s
    if not rate:
        say("no request of the trace ended in the time given: more seconds are needed")
        return [saturated]
    # Scaled by themselves: of a longer piece the beginning may be far above or below the mean.
    first = traced[: max(2, round(rate * seconds))]
    return [saturated, await bench.arriving(first, requests_per_s=rate)]
