"""What a run has found: rates by system and work, their medians, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.box import MARKDOWN
from rich.table import Table

from tests.benchmarks.report import Figures


@dataclass(kw_only=True)
class Results:
    """Everything measured, a value for each round.

    `rates[system][work]` are tokens/s: new tokens of decoding, prompt tokens of prefill.
    """

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    start_s: dict[str, list[float]] = field(default_factory=dict)
    peak_memory_bytes: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    # Of our own systems, by work: what the mesh's processes did.
    figures: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, system: str, work: str, *, rate: float, figures: Sequence[Figures]) -> None:
        """Keeps what one system did of one work in one round."""
        self.rates.setdefault(system, {}).setdefault(work, []).append(rate)
        self.figures.setdefault(system, {}).setdefault(work, []).extend(figures)

    def rate(self, system: str, work: str) -> float | None:
        """Median over the rounds; None where it was not measured."""
        values = self.rates.get(system, {}).get(work)
        return median(values) if values else None

    def best(self, work: str, systems: Iterable[str]) -> tuple[str, float] | None:
        """The fastest of these systems at this work, and its rate."""
        found = [(name, self.rate(name, work)) for name in systems]
        known = [(name, rate) for name, rate in found if rate is not None]
        return max(known, key=lambda one: one[1], default=None)

    def of_family(self, family: str) -> list[str]:
        """Names of a family's systems, in the order in which they first ran."""
        return [name for name, one in self.families.items() if one == family]


def spread(values: Sequence[float]) -> str:
    """A median with its range, `1,234 [1,200-1,250]`; a single value stands alone."""
    if len(values) == 1:
        return f"{values[0]:,.0f}"
    return f"{median(values):,.0f} [{min(values):,.0f}-{max(values):,.0f}]"


def rates_table(results: Results, works: Sequence[str]) -> Table:
    """Tokens/s, a row a system and a column a work, and what it took in memory."""
    table = Table(box=MARKDOWN, title="tokens/s, median [min-max]", title_justify="left")
    table.add_column("system", no_wrap=True)
    for work in works:
        table.add_column(work, justify="right", no_wrap=True)
    table.add_column("start s", justify="right")
    table.add_column("peak MiB", justify="right")
    for system in results.families:
        rates = results.rates.get(system, {})
        cells = [spread(rates[work]) if rates.get(work) else "-" for work in works]
        starts = results.start_s.get(system)
        peak = peak_memory(results, system)
        table.add_row(
            system,
            *cells,
            f"{median(starts):.1f}" if starts else "-",
            f"{peak / 2**20:,.0f}" if peak else "-",
        )
    return table


def peak_memory(results: Results, system: str) -> int | None:
    """The most that a system's processes held together; pages that they share count in each."""
    rounds = results.peak_memory_bytes.get(system)
    return max(sum(processes.values()) for processes in rounds) if rounds else None
