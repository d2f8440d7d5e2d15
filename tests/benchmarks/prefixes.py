"""`python -m tests.benchmarks.prefixes`: what the prefix cache is worth, with it and without it.

First one client: prompts of 1,000 tokens, each sent twice, one new token. Then 16 clients whose
prompts begin with the same 1,000 tokens, go on with 32 of their own and get 64 new ones.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
import uvloop

from services.cli.console import out as console
from services.cli.console import say
from services.common.channels import open_channel
from tests.benchmarks.load import LoadGenerator, Request, encode_grpc, grpc_answers
from tests.benchmarks.measurements import Measured, mesh_bench
from tests.benchmarks.meters import read_processes
from tests.benchmarks.report import Figures, latency_table, make_figures
from tests.benchmarks.systems import System, started_mesh

COMMON_TOKENS, OWN_TOKENS, NEW_TOKENS = 1000, 32, 64
CLIENTS = 16
PROMPTS = 6
# Ids that every model has, and none treats in a way of its own.
TOKEN_IDS = range(300, 30_000)
WARM_UP_S = 4.0


def main(
    seconds: Annotated[float, typer.Option(help="Length of the measurement under load.")] = 12.0,
) -> None:
    """Prints a table."""
    figures = []
    for cache in ("--no-prefix-cache", "--prefix-cache"):
        with started_mesh([cache]) as system:
            number_format, measured = uvloop.run(_measure(system, cache, seconds=seconds))
            figures += measured
    console.print(latency_table(figures, number_format))


async def _measure(system: System, cache: str, *, seconds: float) -> Measured:
    channel = open_channel(system.address)
    try:
        bench = await mesh_bench(system, channel, answers=grpc_answers(channel))
        rng = random.Random(1)
        prompts = [_tokens(rng, COMMON_TOKENS) for _ in range(PROMPTS)]
        figures = []
        for turn in ("first", "again"):
            generator = LoadGenerator(bench.answers)
            requests = iter([_request(prompt, num_new_tokens=1) for prompt in prompts])
            load = f"{cache} 1,000 tokens, {turn}"
            figures.append(await _run(system, generator, [requests], load, seconds=None))
        common = _tokens(rng, COMMON_TOKENS)
        workers = [_shared(common, seed=client) for client in range(CLIENTS)]
        load = f"{cache} shared, {CLIENTS} clients"
        generator = LoadGenerator(bench.answers)
        figures.append(await _run(system, generator, workers, load, seconds=seconds))
        return Measured(bench.number_format, figures)
    finally:
        await channel.close()


async def _run(
    system: System,
    generator: LoadGenerator,
    workers: Sequence[Iterator[Request]],
    load: str,
    *,
    seconds: float | None,
) -> Figures:
    """To the end of the requests, or for so many seconds after a warm-up."""
    warm_up_s, limit_s = (0.0, 600.0) if seconds is None else (WARM_UP_S, WARM_UP_S + seconds)
    until_s = time.monotonic() + limit_s
    running = asyncio.create_task(generator.closed_loop(workers, until_s=until_s))
    await asyncio.sleep(warm_up_s)
    before, from_s = read_processes(system.processes), time.monotonic()
    await running
    to_s, after = time.monotonic(), read_processes(system.processes)
    figures = make_figures(
        load, generator.tally, from_s=from_s, to_s=to_s, before=before, after=after
    )
    cpu_ms = {
        last.name: 1e3 * (last.cpu_s - first.cpu_s) / max(figures.requests, 1)
        for first, last in zip(before, after, strict=True)
    }
    say(f"{load}: CPU ms a request: " + ", ".join(f"{n} {ms:.1f}" for n, ms in cpu_ms.items()))
    return figures


def _shared(common: list[int], *, seed: int) -> Iterator[Request]:
    rng = random.Random(f"shared {seed}")
    while True:
        yield _request(common + _tokens(rng, OWN_TOKENS), num_new_tokens=NEW_TOKENS)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(TOKEN_IDS, k=count)


def _request(token_ids: list[int], *, num_new_tokens: int) -> Request:
    return Request(
        message=encode_grpc(token_ids, num_new_tokens),
        num_prompt_tokens=len(token_ids),
        num_new_tokens=num_new_tokens,
    )


if __name__ == "__main__":
    typer.run(main)
