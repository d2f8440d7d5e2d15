"""`python -m tests.benchmarks.mooncake TRACE`: what share of real prompts a prefix cache finds.

TRACE is `mooncake_conversation.jsonl.gz` of Mooncake (Qin et al., FAST 2025), whose requests name
the content of each 512 tokens of their prompts. The real scheduler runs them on a simulated
pipeline that keeps up with them, with KV caches of several sizes.
"""

from __future__ import annotations

import gzip
import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from core.pipeline.batch_time import Coefficients
from core.pipeline.settings import SchedulerSettings
from core.pipeline.simulate import SimulatedRequest, SimulationSettings, simulate
from services.cli.console import say

NAMED_TOKENS = 512
BLOCK_SIZE = 16
# Two stages that together compute about 140,000 prompt tokens a second.
STAGE = Coefficients(1e-3, 5e-6, 1e-10)


def main(
    trace: Annotated[Path, typer.Argument(help="The trace, gzipped JSON lines.")],
    requests: Annotated[int, typer.Option(help="How many of its requests.")] = 4000,
    millions: Annotated[
        str, typer.Option(help="KV cache of each stage, in millions of positions.")
    ] = "0.5 1 2 4 64",
) -> None:
    """Prints the share of prompt tokens that were found, and TTFT, for each size."""
    load = list(islice(read_trace(trace), requests))
    total = sum(request.num_prompt for request in load)
    say(f"{len(load)} requests, {total / len(load):.0f} prompt tokens on average")
    for size in millions.split():
        report = simulate(
            load,
            SimulationSettings(
                stages=(STAGE, STAGE),
                num_kv_blocks=int(float(size) * 1e6 / BLOCK_SIZE),
                kv_block_size=BLOCK_SIZE,
                scheduler=SchedulerSettings(max_waiting=len(load)),
            ),
        )
        first_s = sorted(report.time_to_first_token_s)
        say(
            f"{size} million positions: {report.cached_share:.1%} cached, "
            f"TTFT p50 {first_s[len(first_s) // 2]:.2f} s, "
            f"p99 {first_s[len(first_s) * 99 // 100]:.2f} s, "
            f"{report.num_preemptions} preemptions"
        )


def read_trace(path: Path) -> Iterator[SimulatedRequest]:
    """Requests in order of arrival; equal content becomes equal tokens."""
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            tokens = array("I")
            for content in row["hash_ids"]:
                tokens.extend([content] * NAMED_TOKENS)
            num_prompt = row["input_length"]
            yield SimulatedRequest(
                arrival_s=row["timestamp"] / 1000,
                num_prompt=num_prompt,
                num_output=max(row["output_length"], 1),
                token_ids=tokens[:num_prompt],
            )


if __name__ == "__main__":
    typer.run(main)
