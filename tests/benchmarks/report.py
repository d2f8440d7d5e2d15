"""Turns a tally and two readings of the processes into figures, a table and JSON."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from tests.benchmarks.load import Tally
from tests.benchmarks.meters import ProcessReading


@dataclass(frozen=True, kw_only=True)
class StageShares:
    """How one stage spent a measurement; each a share of the wall clock."""

    name: str
    busy: float
    starved: float  # the sum of the four causes
    wire: float
    serialise: float
    stolen: float = 0.0  # of `busy`: others had the core
    starved_schedule: float = 0.0
    starved_upstream: float = 0.0
    starved_wire: float = 0.0
    starved_serialise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of the table. Latencies are in milliseconds, from the client's side."""

    load: str
    duration_s: float
    requests: int
    tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    stages: list[StageShares] = field(default_factory=list)
    cpu_us_per_token: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    num_errors: int = 0
    errors: list[str] = field(default_factory=list)  # the first few


def make_figures(
    load: str,
    tally: Tally,
    *,
    from_s: float,
    to_s: float,
    before: Sequence[ProcessReading],
    after: Sequence[ProcessReading],
) -> Figures:
    """Counts what happened between two moments of time.monotonic()."""
    duration_s = to_s - from_s
    tokens = _sum_within(tally.token_times_s, tally.token_counts, from_s, to_s)
    prompt_tokens = _sum_within(tally.first_token_at_s, tally.prompt_tokens, from_s, to_s)
    ttft_ms = _within(tally.first_token_at_s, tally.first_token_s, from_s, to_s) * 1e3
    gap_ms = _within(tally.gap_at_s, tally.gap_s, from_s, to_s) * 1e3
    ended = np.asarray(tally.ended_at_s)
    return Figures(
        load=load,
        duration_s=duration_s,
        requests=int(((ended >= from_s) & (ended < to_s)).sum()),
        tokens_per_s=tokens / duration_s,
        prompt_tokens_per_s=prompt_tokens / duration_s,
        ttft_p50_ms=_percentile(ttft_ms, 50),
        ttft_p99_ms=_percentile(ttft_ms, 99),
        inter_token_p50_ms=_percentile(gap_ms, 50),
        inter_token_p99_ms=_percentile(gap_ms, 99),
        stages=_stage_shares(before, after, duration_s),
        cpu_us_per_token=_cpu_us_per_token(before, after, tokens),
        peak_memory_bytes={reading.name: reading.peak_memory_bytes for reading in after},
        num_errors=len(tally.errors),
        errors=tally.errors[:10],
    )


def latency_table(figures: Sequence[Figures], number_format: str) -> Table:
    """Throughput and latency, one row a load."""
    title = f"{number_format}, seen by the clients"
    table = Table(box=None, title=title, title_justify="left")
    columns = ("load", "requests", "tokens/s", "prompt tokens/s")
    for column in (*columns, "TTFT p50", "p99 ms", "inter-token p50", "p99 ms", "errors"):
        table.add_column(column, justify="left" if column == "load" else "right", no_wrap=True)
    for row in figures:
        latencies = (row.ttft_p50_ms, row.ttft_p99_ms, row.inter_token_p50_ms)
        table.add_row(
            row.load,
            str(row.requests),
            f"{row.tokens_per_s:.0f}",
            f"{row.prompt_tokens_per_s:.0f}",
            *(f"{latency:.1f}" for latency in (*latencies, row.inter_token_p99_ms)),
            str(row.num_errors),
        )
    return table


def process_table(figures: Sequence[Figures]) -> Table:
    """What the parts did meanwhile: a column for each stage, and CPU time for each token."""
    names = [stage.name for stage in figures[0].stages]
    table = Table(box=None, title="inside the mesh", title_justify="left")
    table.add_column("load")
    for name in names:
        table.add_column(
            f"{name}: busy (stolen), starved:\nschedule, upstream, wire, serialise", justify="right"
        )
    for name in figures[0].cpu_us_per_token:
        table.add_column(f"{name}\nCPU us/token", justify="right")
    for row in figures:
        shares = (
            f"{stage.busy:.0%} ({stage.stolen:.0%}), {stage.starved:.0%}: "
            f"{stage.starved_schedule:.0%}, {stage.starved_upstream:.0%}, "
            f"{stage.starved_wire:.0%}, {stage.starved_serialise:.1%}"
            for stage in row.stages
        )
        table.add_row(row.load, *shares, *(f"{us:.0f}" for us in row.cpu_us_per_token.values()))
    return table


def memory_line(figures: Figures) -> str:
    """Peak resident memory of each process, in MiB."""
    sizes = (f"{name} {size / 2**20:.0f}" for name, size in figures.peak_memory_bytes.items())
    return f"peak memory, MiB: {', '.join(sizes)}"


def _within(
    at_s: array[float], values: array[float], from_s: float, to_s: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    times = np.asarray(at_s)
    return np.asarray(values)[(times >= from_s) & (times < to_s)]


def _sum_within(at_s: array[float], values: array[int], from_s: float, to_s: float) -> int:
    times = np.asarray(at_s)
    return int(np.asarray(values)[(times >= from_s) & (times < to_s)].sum())


def _percentile(values: np.ndarray, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def _stage_shares(
    before: Sequence[ProcessReading], after: Sequence[ProcessReading], duration_s: float
) -> list[StageShares]:
    first = {reading.name: reading.stage_s for reading in before}
    return [
        StageShares(
            name=reading.name,
            **{
                name: (seconds - first[reading.name][name]) / duration_s
                for name, seconds in reading.stage_s.items()
            },
        )
        for reading in after
        if reading.stage_s and reading.name in first
    ]


def _cpu_us_per_token(
    before: Sequence[ProcessReading], after: Sequence[ProcessReading], tokens: int
) -> dict[str, float]:
    first = {reading.name: reading.cpu_s for reading in before}
    return {
        reading.name: (reading.cpu_s - first[reading.name]) * 1e6 / max(1, tokens)
        for reading in after
        if reading.name in first
    }
