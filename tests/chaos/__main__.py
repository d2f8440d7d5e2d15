"""`python -m tests.chaos`: faults, one at a time, and a table of what became of every stream.

For each model, number format and number of replicas a mesh of real processes runs the same streams
again and again; each time one part of it is hit at a moment that the seed chooses. Every answer
must be what it is without a fault, to the bit of each log probability.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from services.cli.console import out as console
from services.cli.console import say
from services.local.catalogue import DEFAULT_MODEL
from services.local.fetch import resolve_model
from tests.chaos.faults import Fault, find_faults
from tests.chaos.mesh import ChaosMesh, Shape
from tests.chaos.rounds import Round, Rounds
from tests.chaos.streams import make_streams
from tests.support.models import TinyModel, write_servable


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """Rounds on meshes of one shape."""

    title: str
    shape: Shape
    vocab_size: int
    num_streams: int
    # What befalls it, in order: a fault and the seed of the round.
    rounds: tuple[tuple[Fault, int], ...]


async def run_campaign(campaign: Campaign, *, folder: Path) -> list[Round]:
    """Runs all rounds; a mesh that stays broken is replaced."""
    done: list[Round] = []
    seed, count = campaign.shape.seed, campaign.num_streams
    streams = make_streams(seed, count=count, vocab_size=campaign.vocab_size)
    left = list(campaign.rounds)
    while left:
        async with (
            ChaosMesh(campaign.shape, folder=folder) as mesh,
            Rounds(mesh, streams) as rounds,
        ):
            while left:
                fault, round_seed = left.pop(0)
                result = await rounds.run(fault, seed=round_seed)
                done.append(result)
                say_result(campaign, result)
                if result.recovery_s is None:
                    break
    return done


def say_result(campaign: Campaign, result: Round) -> None:
    """One line while it runs; the seed repeats it."""
    longest_s = max(result.pauses_s, default=0.0)
    recovery = "never" if result.recovery_s is None else f"{result.recovery_s:.2f} s"
    say(
        f"{campaign.title}: {result.fault} ({result.part}, seed {result.seed}): "
        f"lost {len(result.lost)}, changed {len(result.changed)}, "
        f"longest pause {longest_s:.2f} s, recovery {recovery}"
    )


def choose_rounds(faults: Sequence[Fault], *, count: int, seed: int) -> Iterator[tuple[Fault, int]]:
    """Faults in turn, in an order that the seed chooses."""
    rng = random.Random(seed)
    for index in range(count):
        if index % len(faults) == 0:
            order = rng.sample(faults, len(faults))
        yield order[index % len(faults)], seed * 100_000 + index


def table(results: Sequence[Round]) -> Table:
    """What goes into the README."""
    made = Table("fault", "faults", "requests", "lost", "changed", "pause p50", "p99", "recovery")
    for name in dict.fromkeys(result.fault for result in results):
        rows = [result for result in results if result.fault == name]
        pauses = sorted(pause for row in rows for pause in row.pauses_s)
        recoveries = [row.recovery_s for row in rows if row.recovery_s is not None]
        never = len(rows) - len(recoveries)
        made.add_row(
            name,
            str(len(rows)),
            str(sum(row.num_streams for row in rows)),
            str(sum(len(row.lost) for row in rows)),
            str(sum(len(row.changed) for row in rows)),
            _seconds(pauses, 0.5),
            _seconds(pauses, 0.99),
            _seconds(sorted(recoveries), 0.5) + (f", {never} never" if never else ""),
        )
    return made


def _seconds(ordered: Sequence[float], share: float) -> str:
    if not ordered:
        return "-"
    return f"{ordered[min(int(share * len(ordered)), len(ordered) - 1)]:.2f} s"


def make_campaigns(
    *, faults: Sequence[Fault], count: int, seed: int, num_streams: int, folder: Path
) -> list[Campaign]:
    """Half of the rounds on a tiny model, half on the default one; with a replica to spare and
    without, in bf16 and int8."""
    tiny_model = TinyModel(family="llama", num_layers=4)
    tiny = write_servable(folder, tiny_model)
    shapes = [
        ("tiny, 2 replicas", Shape(model=tiny, num_replicas=2, seed=seed), tiny_model.vocab_size),
        ("tiny, 1 replica", Shape(model=tiny, seed=seed), tiny_model.vocab_size),
    ]
    real = resolve_model(DEFAULT_MODEL)
    for number_format, num_replicas in (("int8", 2), ("bf16", 2)):
        shape = Shape(model=real, number_format=number_format, num_replicas=num_replicas, seed=seed)
        shapes.append((f"{DEFAULT_MODEL} {number_format}, {num_replicas} replicas", shape, 49_000))
    chosen = list(choose_rounds(faults, count=count, seed=seed))
    return [
        Campaign(
            title=title,
            shape=shape,
            vocab_size=vocab_size,
            num_streams=num_streams,
            rounds=tuple(chosen[index :: len(shapes)]),
        )
        for index, (title, shape, vocab_size) in enumerate(shapes)
    ]


def main(
    faults: Annotated[int, typer.Option(envvar="PENSTOCK_FAULTS", help="How many.")] = 200,
    seed: Annotated[int, typer.Option(envvar="PENSTOCK_SEED", help="Of everything.")] = 1,
    streams: Annotated[
        int, typer.Option(envvar="PENSTOCK_STREAMS", help="Streams under each fault.")
    ] = 32,
    kinds: Annotated[
        str, typer.Option(envvar="PENSTOCK_KINDS", help="Parts of names of faults, with commas.")
    ] = "",
    only: Annotated[str, typer.Option(help="Part of a campaign's title.")] = "",
) -> None:
    """Runs all campaigns, and prints what became of every stream."""
    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as name:
        folder = Path(name)
        campaigns = make_campaigns(
            faults=find_faults(kinds), count=faults, seed=seed, num_streams=streams, folder=folder
        )
        results = [
            result
            for campaign in campaigns
            if only in campaign.title and campaign.rounds
            for result in asyncio.run(run_campaign(campaign, folder=folder))
        ]
    console.print(table(results))
    if any(result.lost or result.changed or result.recovery_s is None for result in results):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
