"""The goals: what is compared with what, and by how much ours shall be ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import MARKDOWN
from rich.table import Table

from tests.benchmarks.peers.results import Results, peak_memory


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One goal as it came out. `ratio` is ours over the peer's, or ours over the limit where no
    peer is involved; None where something was not measured."""

    measure: str
    ours: str
    against: str
    ratio: float | None
    goal: str
    met: bool | None


def outcomes(results: Results, *, memory_limits: dict[str, int]) -> list[Outcome]:
    """All goals that the run can say something about."""
    penstock, vllm = results.of_family("penstock"), results.of_family("vllm")
    llamacpp = results.of_family("llamacpp")
    rows = []
    for streams, factor in ((8, 1.8), (32, 1.8), (64, 1.6), (128, 1.9), (256, 1.9)):
        rows.append(_faster(results, f"decode {streams}", penstock, vllm, factor))
    bf16 = [name for name in penstock if "bf16" in name]
    for peer, factor in (("vllm bf16", 1.2), ("vllm bf16 pipelined", 1.8)):
        rows.append(_faster(results, "decode 64", bf16, [peer], factor))
    rows.append(_faster(results, "prefill", penstock, vllm, 1.25))
    rows.append(_faster(results, "decode 1", penstock, llamacpp, 1.0))
    rows += _of_the_mesh(results, penstock, memory_limits=memory_limits)
    return [row for row in rows if row is not None]


def goals_table(rows: Sequence[Outcome]) -> Table:
    """A row a goal."""
    table = Table(box=MARKDOWN, title="goals (medians of this run)", title_justify="left")
    for column in ("measure", "ours", "against", "ratio", "goal", "met"):
        table.add_column(column, justify="right" if column == "ratio" else "left", no_wrap=True)
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        met = {True: "yes", False: "no", None: "-"}[row.met]
        table.add_row(row.measure, row.ours, row.against, ratio, row.goal, met)
    return table


def _faster(
    results: Results, work: str, ours: Sequence[str], peers: Sequence[str], factor: float
) -> Outcome | None:
    """Ours at its best against the peers at their best."""
    mine, theirs = results.best(work, ours), results.best(work, peers)
    if mine is None and theirs is None:
        return None
    ratio = mine[1] / theirs[1] if mine and theirs else None
    return Outcome(
        measure=f"{work}, tokens/s",
        ours=_named(mine),
        against=_named(theirs),
        ratio=ratio,
        goal=f">= {factor} x",
        met=None if ratio is None else ratio >= factor,
    )


def _named(best: tuple[str, float] | None) -> str:
    return "not measured" if best is None else f"{best[1]:,.0f} ({best[0]})"


def _of_the_mesh(
    results: Results, systems: Sequence[str], *, memory_limits: dict[str, int]
) -> list[Outcome | None]:
    """What concerns ours alone, for the format that is fastest at 64 streams."""
    best = results.best("decode 64", systems)
    if best is None:
        return []
    name = best[0]
    figures = results.figures[name]["decode 64"]
    slowest = [max(one.stages, key=lambda stage: stage.busy).starved for one in figures]
    services = [
        sum(us for part, us in one.cpu_us_per_token.items() if not part.startswith("stage"))
        for one in figures
    ]
    peak, limit = peak_memory(results, name), memory_limits.get(name)
    return [
        _below("starved share of the slowest stage, 64 streams", median(slowest), 0.08, name, "%"),
        _below("gateway + coordinator CPU a token, 64 streams", median(services), 80.0, name, "us"),
        _below("start to first token", median(results.start_s[name]), 4.0, name, "s"),
        _below("memory of all processes", peak / 2**20, limit / 2**20, name, "MiB")
        if peak and limit
        else None,
    ]


def _below(measure: str, value: float, limit: float, name: str, unit: str) -> Outcome:
    def text(number: float) -> str:
        return f"{number:.1%}" if unit == "%" else f"{number:,.1f} {unit}"

    return Outcome(
        measure=measure,
        ours=f"{text(value)} ({name})",
        against="",
        ratio=value / limit,
        goal=f"< {text(limit)}",
        met=value < limit,
    )
