"""How long a stage takes for a micro-batch, learned from its reports.

    seconds = fixed + per_row * rows + per_pair * pairs

`fixed` is what reading the weights costs, `per_row` the arithmetic, `per_pair` attention:
a pair is one row looking at one position of its sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Micro-batches (rows, pairs) at which a prior stands for an observation.
_PRIOR_POINTS = np.array([[1.0, 1.0, 64.0], [1.0, 32.0, 2048.0], [1.0, 256.0, 32768.0]])
_PRIOR_WEIGHT = 0.5
# Brings rows and pairs near one, so that the normal equations are well conditioned.
_UNITS = np.array([1.0, 32.0, 2048.0])
# An observation's weight halves after 350 later ones: seconds of decoding.
_FORGET = 0.998
# Observations beyond this multiple of the prediction are stalls, not arithmetic.
_OUTLIER = 5.0


class Coefficients(NamedTuple):
    """Seconds: a micro-batch, a row, a pair."""

    fixed_s: float
    per_row_s: float
    per_pair_s: float

    def seconds(self, rows: float, pairs: float) -> float:
        return self.fixed_s + self.per_row_s * rows + self.per_pair_s * pairs

    def rows_within(self, budget_s: float, position: int) -> int:
        """Most rows of a chunk that begins at `position` and takes at most `budget_s`.

        Row i of the chunk attends to position + i + 1 positions, so time grows with the square.
        """
        linear = self.per_row_s + self.per_pair_s * (position + 0.5)
        square = 0.5 * self.per_pair_s
        if budget_s <= 0:
            return 0
        if square <= 1e-15:
            return int(min(budget_s / max(linear, 1e-12), 1e9))
        root = (linear * linear + 4.0 * square * budget_s) ** 0.5
        return int((root - linear) / (2.0 * square))


# A 135M model's half on one core; only the proportions matter once reports arrive.
DEFAULT_PRIOR = Coefficients(2e-3, 2e-4, 5e-7)


class BatchTimeCurve:
    """Recursive weighted least squares with forgetting, coefficients kept non-negative.

    Errors count relative to the time, so that small micro-batches are fitted as well as big
    ones. The prior is scaled to the first observations and gives way to later ones.
    """

    def __init__(self, prior: Coefficients = DEFAULT_PRIOR) -> None:
        self._prior = np.array(prior)
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)
        self._log_scale = 0.0
        self._weight = 0.0
        self._variance = 0.01
        self.num_observations = 0
        self.coefficients = prior

    @property
    def variation(self) -> float:
        """Standard deviation of observed time over predicted time."""
        return float(self._variance**0.5)

    def observe(
        self, rows: Sequence[float], pairs: Sequence[float], seconds: Sequence[float]
    ) -> None:
        """Takes in micro-batches, oldest first, and fits again."""
        for row_count, pair_count, time_s in zip(rows, pairs, seconds, strict=True):
            if time_s > 0:
                self._add(np.array([1.0, row_count, pair_count]), time_s)
        self._fit()

    def _add(self, features: Array, time_s: float) -> None:
        self._log_scale_step(features, time_s)
        if self.num_observations > 8:
            ratio = time_s / max(self.coefficients.seconds(features[1], features[2]), 1e-9)
            if ratio > _OUTLIER:
                time_s *= _OUTLIER / ratio
                ratio = _OUTLIER
            self._variance += 0.02 * (min(ratio - 1.0, 1.0) ** 2 - self._variance)
        scaled = features / _UNITS / time_s
        self._gram = self._gram * _FORGET + np.outer(scaled, scaled)
        self._moment = self._moment * _FORGET + scaled
        self.num_observations += 1

    def _log_scale_step(self, features: Array, time_s: float) -> None:
        self._weight = self._weight * _FORGET + 1.0
        offset = float(np.log(time_s / (self._prior @ features)))
        self._log_scale += (offset - self._log_scale) / self._weight

    def _fit(self) -> None:
        prior = self._prior * np.exp(self._log_scale)
        points = _PRIOR_POINTS / _UNITS / (_PRIOR_POINTS @ prior)[:, None]
        gram = self._gram + _PRIOR_WEIGHT * points.T @ points
        moment = self._moment + _PRIOR_WEIGHT * points.sum(axis=0)
        solution = _solve_non_negative(gram, moment) / _UNITS
        self.coefficients = Coefficients(*(float(value) for value in solution))


def _solve_non_negative(gram: Array, moment: Array) -> Array:
    """Minimises x'Gx / 2 - m'x over x >= 0 for three unknowns, by trying every support."""
    best, best_value = np.zeros(3), 0.0
    for size in (3, 2, 1):
        for support in combinations(range(3), size):
            index = list(support)
            solution = np.linalg.solve(gram[np.ix_(index, index)], moment[index])
            if (solution < 0).any():
                continue
            value = -0.5 * float(solution @ moment[index])
            if value < best_value:
                best, best_value = np.zeros(3), value
                best[index] = solution
        if best_value < 0 and size == 3:
            break
    return best
