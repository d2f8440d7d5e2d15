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
# What observations of a size must weigh before the curve is bent to them.
_ENOUGH = 8.0
# An observation's weight halves after 70 later ones of its size.
_FORGET = 0.99
# Sizes are told apart by powers of two, up to 2 ** (_NUM_SIZES - 1) rows.
_NUM_SIZES = 14
# Observations beyond this multiple of the prediction are stalls, not arithmetic.
_OUTLIER = 5.0
# Observations before a fit can tell stalls and variation from its own error.
_TRUSTED = 16


def size_of(rows_N: Array) -> npt.NDArray[np.int64]:
    """The size, of 0 to 13, that micro-batches of so many rows count as."""
    return np.minimum(np.log2(np.maximum(rows_N, 1.0)).astype(np.int64), _NUM_SIZES - 1)


class Coefficients(NamedTuple):
    """Seconds: a micro-batch, a row, a pair."""

    fixed_s: float
    per_row_s: float
    per_pair_s: float

    def seconds(self, rows: float, pairs: float) -> float:
        return self.fixed_s + self.per_row_s * rows + self.per_pair_s * pairs

    def row_s(self, context: float) -> float:
        """Of one more row, which looks at so many positions."""
        return self.per_row_s + self.per_pair_s * context

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
    """Weighted least squares with forgetting, coefficients kept non-negative.

    Errors count relative to the time, so that small micro-batches are fitted as well as big
    ones. Observations are forgotten in favour of later ones of about the same number of rows:
    thousands of equal micro-batches must not wash out what others taught, or fixed cost could
    no longer be told from cost per row. The prior is scaled to the observations and counts
    little beside them.

    A line is not the whole truth: few rows cost reading the weights, many their arithmetic, with
    a knee between. `bends_B`: observed over fitted time by size (see `size_of`).
    """

    def __init__(self, prior: Coefficients = DEFAULT_PRIOR) -> None:
        self._prior = np.array(prior)
        self._gram_B33 = np.zeros((_NUM_SIZES, 3, 3))
        self._moment_B3 = np.zeros((_NUM_SIZES, 3))
        self._weight_B = np.zeros(_NUM_SIZES)
        self._log_scale = 0.0
        self._scale_weight = 0.0
        self._variance = 0.01
        self._unfitted: tuple[list[float], list[float], list[float]] = ([], [], [])
        self._num_fitted = 0
        self.num_observations = 0
        self.coefficients = prior
        self.bends_B = np.ones(_NUM_SIZES)

    @property
    def variation(self) -> float:
        """Standard deviation of observed time over predicted time, as of the last fit."""
        return float(self._variance**0.5)

    def observe(
        self, rows: Sequence[float], pairs: Sequence[float], seconds: Sequence[float]
    ) -> None:
        """Takes in micro-batches, oldest first; they count from the next `fit` on."""
        for kept, new in zip(self._unfitted, (rows, pairs, seconds), strict=True):
            kept.extend(new)
        self.num_observations += len(seconds)

    def _digest(self) -> None:
        """All at once what was observed since the last fit: reports are many, and short."""
        rows_N, pairs_N, seconds_N = (np.array(kept, np.float64) for kept in self._unfitted)
        for kept in self._unfitted:
            kept.clear()
        seconds_N = np.maximum(seconds_N, 1e-9)
        features_N3 = np.stack([np.ones(len(rows_N)), rows_N, pairs_N], axis=1)
        self._scale_prior(features_N3, seconds_N)
        if self._num_fitted >= _TRUSTED:
            seconds_N = self._judge(features_N3, seconds_N)
        scaled_N3 = features_N3 / _UNITS / seconds_N[:, None]
        sizes_N = size_of(rows_N)
        for size in np.unique(sizes_N):
            self._remember(int(size), scaled_N3[sizes_N == size])

    def _remember(self, size: int, scaled_N3: Array) -> None:
        count = len(scaled_N3)
        weights_N = _FORGET ** np.arange(count - 1, -1, -1, dtype=np.float64)
        forget = _FORGET**count
        gram_33 = (scaled_N3 * weights_N[:, None]).T @ scaled_N3
        self._gram_B33[size] = self._gram_B33[size] * forget + gram_33
        self._moment_B3[size] = self._moment_B3[size] * forget + weights_N @ scaled_N3
        self._weight_B[size] = self._weight_B[size] * forget + weights_N.sum()

    def _scale_prior(self, features_N3: Array, seconds_N: Array) -> None:
        """Moves the prior to the observed times' magnitude, keeping its proportions."""
        offset = float(np.mean(np.log(seconds_N / (features_N3 @ self._prior))))
        count = len(seconds_N)
        self._scale_weight = self._scale_weight * _FORGET**count + count
        self._log_scale += (offset - self._log_scale) * min(count / self._scale_weight, 1.0)

    def _judge(self, features_N3: Array, seconds_N: Array) -> Array:
        """Notes how far times are from the fit, and cuts stalls off."""
        fitted_N = np.maximum(features_N3 @ np.array(self.coefficients), 1e-9)
        ratio_N = seconds_N / fitted_N
        error = float(np.mean(np.minimum(np.abs(ratio_N - 1.0), 1.0) ** 2))
        share = 1.0 - 0.98 ** len(seconds_N)
        self._variance += share * (error - self._variance)
        return np.minimum(seconds_N, _OUTLIER * fitted_N)

    def fit(self) -> None:
        """Brings the coefficients up to date, if anything was observed since the last time."""
        if self._num_fitted == self.num_observations:
            return
        self._digest()
        self._num_fitted = self.num_observations
        prior = self._prior * np.exp(self._log_scale)
        points = _PRIOR_POINTS / _UNITS / (_PRIOR_POINTS @ prior)[:, None]
        gram = self._gram_B33.sum(axis=0) + _PRIOR_WEIGHT * points.T @ points
        moment = self._moment_B3.sum(axis=0) + _PRIOR_WEIGHT * points.sum(axis=0)
        scaled_3 = _solve_non_negative(gram, moment)
        self.coefficients = Coefficients(*(float(value) for value in scaled_3 / _UNITS))
        self._bend(scaled_3)

    def _bend(self, scaled_3: Array) -> None:
        """Sizes that were hardly seen are taken to be like those beside them."""
        (seen,) = np.nonzero(self._weight_B >= _ENOUGH)
        if len(seen):
            bends = self._weight_B[seen] / (self._moment_B3[seen] @ scaled_3)
            self.bends_B = np.interp(np.arange(_NUM_SIZES), seen, bends)


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
