"""What one more row of a micro-batch costs, from the round trips of decodes themselves.

A straight line through rows and seconds, older round trips counting less. Unlike the stages'
own times it includes everything that a row costs on its way: sampling, frames, messages.
"""

from __future__ import annotations

# A round trip's weight halves after 70 later ones.
_FORGET = 0.99
# Fewer round trips, or hardly different rows, say nothing of a slope.
_LEAST_WEIGHT = 24.0
_LEAST_VARIANCE = 0.25


class RowCost:
    """Exponentially weighted least squares of two unknowns."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean_rows = self._mean_s = 0.0
        self._rows_rows = self._rows_s = 0.0  # weighted sums of products of deviations

    def observe(self, rows: int, seconds: float) -> None:
        """Takes in a round trip of a micro-batch that was alone in the pipeline."""
        self._weight = _FORGET * self._weight + 1.0
        share = 1.0 / self._weight
        off_rows, off_s = rows - self._mean_rows, seconds - self._mean_s
        self._mean_rows += share * off_rows
        self._mean_s += share * off_s
        self._rows_rows = _FORGET * self._rows_rows + off_rows * (rows - self._mean_rows)
        self._rows_s = _FORGET * self._rows_s + off_rows * (seconds - self._mean_s)

    @property
    def row_s(self) -> float | None:
        """Seconds a row; None while too little is known."""
        if self._weight < _LEAST_WEIGHT or self._rows_rows < _LEAST_VARIANCE * self._weight:
            return None
        return max(self._rows_s / self._rows_rows, 0.0)
