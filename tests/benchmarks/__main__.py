"""`python -m tests.benchmarks`: measures a mesh under closed-loop and open-loop load.

Closed loop: S clients, each sends its next request when the one before has ended: 16 to 64
random prompt tokens, 128 new tokens, greedy, end-of-sequence ignored. Open loop: arrivals
and lengths of a real trace, first with as many clients as saturate the mesh to find its rate,
then in the trace's own pattern at a share of that rate.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import grpc.aio
import typer
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub
from rich.console import Console

from services.common.channels import open_channel
from tests.benchmarks.load import LoadGenerator, Request, make_request
from tests.benchmarks.meters import read_processes
from tests.benchmarks.report import (
    Figures,
    latency_table,
    make_figures,
    memory_line,
    process_table,
)
from tests.benchmarks.systems import System, started_mesh
from tests.benchmarks.trace import clip, read_trace, scale

SEED = 20231116
NEW_TOKENS = 128
PROMPT_TOKENS = (16, 64)
WARM_UP_S = 3.0
SATURATING_CLIENTS = 32
OPEN_LOOP_SHARE = 0.8
# The trace is long; this many requests have its mix of lengths.
TRACE_REQUESTS = 2000

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    streams: tuple[int, ...]
    seconds: float
    requests: int | None
    open_loop_seconds: float


def main(
    streams: Annotated[
        str, typer.Option(envvar="PENSTOCK_STREAMS", help="Numbers of clients, such as '1 64'.")
    ] = "1 8 32 64",
    seconds: Annotated[
        float, typer.Option(envvar="PENSTOCK_SECONDS", help="Length of each measurement.")
    ] = 20.0,
    requests: Annotated[
        int | None,
        typer.Option(envvar="PENSTOCK_REQUESTS", help="Ends each after so many requests instead."),
    ] = None,
    open_loop_seconds: Annotated[
        float, typer.Option(help="Length of the trace's replay; 0 leaves it out.")
    ] = 60.0,
    address: Annotated[
        str | None,
        typer.Option(envvar="PENSTOCK_ADDRESS", help="A running mesh; by default one is started."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", envvar="PENSTOCK_JSON", help="Where to write JSON.")
    ] = None,
    model: Annotated[str | None, typer.Option(envvar="PENSTOCK_MODEL")] = None,
    stages: Annotated[str | None, typer.Option(envvar="PENSTOCK_STAGES")] = None,
    dtype: Annotated[str | None, typer.Option(envvar="PENSTOCK_DTYPE")] = None,
    split: Annotated[str | None, typer.Option(envvar="PENSTOCK_SPLIT")] = None,
) -> None:
    """Measures and prints a table."""
    plan = Plan(
        streams=tuple(int(count) for count in streams.split()),
        seconds=seconds,
        requests=requests,
        open_loop_seconds=open_loop_seconds,
    )
    chosen = {"--model": model, "--stages": stages, "--dtype": dtype, "--split": split}
    options = [part for name, value in chosen.items() if value for part in (name, value)]
    running = (
        nullcontext(System(name="penstock", address=address)) if address else started_mesh(options)
    )
    with running as system:
        if system.start_s is not None:
            console.print(f"from the command to the first token: {system.start_s:.2f} s")
        figures = asyncio.run(measure(system, plan))
    show(figures)
    if json_path is not None:
        json_path.write_text(json.dumps(document(system, plan, options, figures), indent=1) + "\n")


async def measure(system: System, plan: Plan) -> list[Figures]:
    """All measurements, one after another, on one channel."""
    channel = open_channel(system.address)
    try:
        model = await only_model(channel)
        figures = []
        for count in plan.streams:
            figures.append(await measure_closed(system, channel, model, plan, count))
            console.print(latency_table(figures[-1:]))
        if plan.open_loop_seconds:
            figures += await measure_trace(system, channel, model, plan)
    finally:
        await channel.close()
    return figures


async def only_model(channel: grpc.aio.Channel) -> pb.Model:
    answer = await GenerationServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=30)
    return answer.models[0]


async def measure_closed(
    system: System, channel: grpc.aio.Channel, model: pb.Model, plan: Plan, count: int
) -> Figures:
    """S clients with short prompts; the first answers are cut to random lengths, so that the
    clients do not march in step."""
    workers = [short_requests(model, client, plan, count) for client in range(count)]
    return await run_closed(system, channel, workers, plan, load=f"{count} streams")


async def measure_trace(
    system: System, channel: grpc.aio.Channel, model: pb.Model, plan: Plan
) -> list[Figures]:
    """The trace's lengths at saturation, then its arrivals at a share of that rate."""
    traced, share = clip(read_trace(limit=TRACE_REQUESTS), context_length=model.context_length)
    console.print(f"trace: {share:.0%} of requests clipped to {model.context_length} tokens")
    rng = random.Random(SEED)
    vocab_size = model.vocab_size

    def as_request(one: int) -> Request:
        lengths = traced[one % len(traced)]
        return make_request(
            rng,
            vocab_size=vocab_size,
            num_prompt_tokens=lengths.num_prompt_tokens,
            num_new_tokens=lengths.num_new_tokens,
        )

    shared = map(as_request, itertools.count())
    workers = [shared] * SATURATING_CLIENTS
    seconds = Plan(streams=(), seconds=plan.open_loop_seconds, requests=None, open_loop_seconds=0)
    saturated = await run_closed(system, channel, workers, seconds, load="trace, saturated")
    rate = OPEN_LOOP_SHARE * saturated.requests / saturated.duration_s
    arrivals = scale(traced, requests_per_s=rate)
    arrivals = [one for one in arrivals if one.at_s < plan.open_loop_seconds]
    requests = [
        make_request(
            rng,
            vocab_size=vocab_size,
            num_prompt_tokens=one.num_prompt_tokens,
            num_new_tokens=one.num_new_tokens,
            at_s=one.at_s,
        )
        for one in arrivals
    ]
    generator = LoadGenerator(channel)
    before, from_s = read_processes(system.processes), time.monotonic()
    await generator.open_loop(requests)
    to_s, after = time.monotonic(), read_processes(system.processes)
    load = f"trace, {rate:.2f} requests/s"
    paced = make_figures(
        load, generator.tally, from_s=from_s, to_s=to_s, before=before, after=after
    )
    return [saturated, paced]


async def run_closed(
    system: System,
    channel: grpc.aio.Channel,
    workers: Sequence[Iterator[Request]],
    plan: Plan,
    *,
    load: str,
) -> Figures:
    """Runs the workers through a warm-up and the measurement."""
    generator = LoadGenerator(channel)
    warm_up_s = 0.0 if plan.requests else WARM_UP_S
    limit_s = 3600.0 if plan.requests else warm_up_s + plan.seconds
    start_s = time.monotonic()
    running = asyncio.create_task(generator.closed_loop(workers, until_s=start_s + limit_s))
    await asyncio.sleep(warm_up_s)
    before, from_s = read_processes(system.processes), time.monotonic()
    await running
    to_s, after = time.monotonic(), read_processes(system.processes)
    return make_figures(load, generator.tally, from_s=from_s, to_s=to_s, before=before, after=after)


def short_requests(model: pb.Model, client: int, plan: Plan, count: int) -> Iterator[Request]:
    """One client's requests: endless, or its part of `plan.requests`."""
    rng = random.Random(SEED + client)
    numbers = itertools.count() if plan.requests is None else range(client, plan.requests, count)
    for turn, _ in enumerate(numbers):
        staggered = turn == 0 and plan.requests is None
        yield make_request(
            rng,
            vocab_size=model.vocab_size,
            num_prompt_tokens=rng.randint(*PROMPT_TOKENS),
            num_new_tokens=rng.randint(1, NEW_TOKENS) if staggered else NEW_TOKENS,
        )


def show(figures: Sequence[Figures]) -> None:
    """Prints everything."""
    console.print()
    console.print(latency_table(figures))
    if figures[0].peak_memory_bytes:
        console.print(process_table(figures))
        console.print(memory_line(figures[-1]))
    for error in sorted({error for row in figures for error in row.errors}):
        console.print(f"error: {error}", markup=False)


def document(
    system: System, plan: Plan, options: Sequence[str], figures: Sequence[Figures]
) -> dict[str, object]:
    """What goes into the JSON file."""
    return {
        "system": system.name,
        "options": list(options),
        "plan": asdict(plan),
        "machine": {"cores": os.cpu_count(), "cpu": platform.processor() or platform.machine()},
        "start_to_first_token_s": system.start_s,
        "figures": [asdict(row) for row in figures],
    }


if __name__ == "__main__":
    typer.run(main)
