"""Campaigns: rounds on meshes of one shape, and a table of what became of every stream."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.table import Table

from services.cli.console import say
from tests.chaos.faults import Fault
from tests.chaos.mesh import ChaosMesh, Shape
from tests.chaos.rounds import Round, Rounds
from tests.chaos.streams import make_streams


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
    pauses = sorted(result.pauses_s)
    recovery = "never" if result.recovery_s is None else f"{result.recovery_s:.2f} s"
    red = "never" if result.red_s is None else f"after {result.red_s:.2f} s"
    say(
        f"{campaign.title}: {result.fault} ({result.part}, seed {result.seed}): "
        f"lost {len(result.lost)}, changed {len(result.changed)}, "
        f"pause p50 {_seconds(pauses, 0.5)}, longest {_seconds(pauses, 1.0)}, "
        f"red {red}, recovery {recovery}"
    )


def choose_rounds(faults: Sequence[Fault], *, count: int, seed: int) -> Iterator[tuple[Fault, int]]:
    """Faults in turn, in an order that the seed chooses."""
    rng = random.Random(seed)
    for index in range(count):
        if index % len(faults) == 0:
            order = rng.sample(faults, len(faults))
        yield order[index % len(faults)], seed * 100_000 + index


def table(results: Sequence[tuple[str, Round]]) -> Table:
    """Of campaigns by title, what goes into the README: a row for each kind of fault."""
    made = Table(
        *("mesh", "fault", "faults", "requests", "lost", "changed", "pause p50", "p99"),
        *("red", "recovery p50", "longest"),
    )
    ordered = sorted(results, key=lambda result: (result[0], result[1].fault))
    for (title, fault), rows in groupby(ordered, key=lambda result: (result[0], result[1].fault)):
        made.add_row(title, fault, *_row([result for _, result in rows]))
    return made


def _row(rows: Sequence[Round]) -> Iterator[str]:
    yield str(len(rows))
    yield str(sum(row.num_streams for row in rows))
    yield str(sum(len(row.lost) for row in rows))
    yield str(sum(len(row.changed) for row in rows))
    pauses = sorted(pause for row in rows for pause in row.pauses_s)
    yield from (_seconds(pauses, 0.5), _seconds(pauses, 0.99))
    yield _seconds(sorted(row.red_s for row in rows if row.red_s is not None), 1.0)
    recoveries = sorted(row.recovery_s for row in rows if row.recovery_s is not None)
    never = len(rows) - len(recoveries)
    yield _seconds(recoveries, 0.5)
    yield f"{never} never" if never else _seconds(recoveries, 1.0)


def _seconds(ordered: Sequence[float], share: float) -> str:
    if not ordered:
        return "-"
    return f"{ordered[min(int(share * len(ordered)), len(ordered) - 1)]:.2f} s"
