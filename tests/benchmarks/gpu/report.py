"""Rows of the GPU table, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model, cut into some stages, under one load."""

    model: str
    weights: str  # "real" or "random"
    stages: int
    sequences: int
    step_ms: float
    limit_ms: float  # of a step that only reads weights and KV cache
    boundary_us: float | None  # added by each cut, against one stage
    generate_tokens_per_s: float | None  # transformers', at the same batch
    continuous_tokens_per_s: float | None

    @property
    def tokens_per_s(self) -> float:
        return self.sequences / self.step_ms * 1e3

    @property
    def limit_share(self) -> float:
        """How near the limit a step is; 1 is as fast as memory can be read."""
        return self.limit_ms / self.step_ms


COLUMNS = (
    "model",
    "weights",
    "stages",
    "sequences",
    "ms a step",
    "tokens/s",
    "of the memory's limit",
    "us a boundary",
    "transformers generate",
    "continuous",
)


def markdown(rows: Sequence[Row]) -> str:
    """A table; what was not measured is left empty."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def progress(row: Row) -> str:
    """A line for somebody who waits for the table."""
    return ", ".join(
        f"{name} {cell}" for name, cell in zip(COLUMNS, _cells(row), strict=True) if cell
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.weights,
        str(row.stages),
        str(row.sequences),
        f"{row.step_ms:.2f}",
        f"{row.tokens_per_s:.0f}",
        f"{row.limit_share:.0%}",
        "" if row.boundary_us is None else f"{row.boundary_us:.0f}",
        _times(row, row.generate_tokens_per_s),
        _times(row, row.continuous_tokens_per_s),
    )


def _times(row: Row, theirs: float | None) -> str:
    """Their tokens a second, and how many times as many are ours."""
    return "" if theirs is None else f"{theirs:.0f} ({row.tokens_per_s / theirs:.1f} x)"
