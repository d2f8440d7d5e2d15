"""Curves of batch times are found from reports."""

from __future__ import annotations

import random

import numpy as np
import pytest

from core.pipeline.batch_time import DEFAULT_PRIOR, BatchTimeCurve, Coefficients, size_of


@pytest.mark.parametrize(
    "truth",
    [
        Coefficients(2e-3, 2e-4, 1e-6),
        Coefficients(0.5, 0.01, 1e-5),  # a model hundreds of times bigger than the prior's
        Coefficients(1e-4, 1e-5, 0.0),
    ],
)
def test_a_curve_finds_the_truth_behind_noisy_times(truth: Coefficients) -> None:
    rng = random.Random(3)
    curve = BatchTimeCurve()
    rows = [rng.choice([1, 4, 16, 64, 256]) for _ in range(400)]
    pairs = [count * rng.randrange(1, 600) for count in rows]
    seconds = [
        truth.seconds(r, p) * rng.uniform(0.9, 1.1) for r, p in zip(rows, pairs, strict=True)
    ]
    for first in range(0, len(rows), 20):
        last = first + 20
        curve.observe(rows[first:last], pairs[first:last], seconds[first:last])
        curve.fit()
    for count, context in ((1, 100), (32, 300), (256, 200)):
        expected = truth.seconds(count, count * context)
        assert curve.coefficients.seconds(count, count * context) == pytest.approx(
            expected, rel=0.1
        )
    assert 0.04 < curve.variation < 0.08  # uniform +-10 % has 5.8 %


def test_before_reports_the_prior_holds() -> None:
    assert BatchTimeCurve().coefficients == DEFAULT_PRIOR


def test_one_size_of_batch_says_little_of_others_but_keeps_proportions() -> None:
    curve = BatchTimeCurve()
    curve.observe([32] * 50, [2048] * 50, [10 * DEFAULT_PRIOR.seconds(32, 2048)] * 50)
    curve.fit()
    assert curve.coefficients.seconds(1, 64) == pytest.approx(
        10 * DEFAULT_PRIOR.seconds(1, 64), rel=0.3
    )


def test_a_curve_follows_a_stage_that_becomes_slower() -> None:
    curve = BatchTimeCurve()
    curve.observe([16, 64] * 200, [1600, 6400] * 200, [0.005, 0.015] * 200)
    curve.observe([16, 64] * 700, [1600, 6400] * 700, [0.010, 0.030] * 700)
    curve.fit()
    assert curve.coefficients.seconds(64, 6400) == pytest.approx(0.030, rel=0.15)


def test_coefficients_are_never_negative() -> None:
    curve = BatchTimeCurve()
    curve.observe([1, 8, 64, 256] * 50, [64, 512, 4096, 16384] * 50, [4e-3, 3e-3, 2e-3, 1e-3] * 50)
    curve.fit()
    assert min(curve.coefficients) >= 0


@pytest.mark.parametrize("position", [0, 100, 5000])
def test_rows_within_a_budget_take_no_longer_than_it(position: int) -> None:
    curve = Coefficients(2e-3, 2e-4, 1e-6)
    rows = curve.rows_within(0.05, position)

    def seconds(count: int) -> float:
        return curve.seconds(count, count * (position + 0.5 + 0.5 * count)) - curve.fixed_s

    assert seconds(rows) <= 0.05 < seconds(rows + 1)


def test_later_chunks_of_equal_time_are_shorter() -> None:
    curve = Coefficients(2e-3, 2e-4, 1e-6)
    assert curve.rows_within(0.05, 0) > curve.rows_within(0.05, 1000) > 0


def test_what_other_sizes_taught_is_kept_through_thousands_of_equal_micro_batches() -> None:
    curve = BatchTimeCurve()
    truth = Coefficients(0.0, 1e-3, 0.0)  # no fixed cost at all, unlike the prior
    for rows in (1, 8, 64):
        curve.observe([rows] * 20, [rows * 64] * 20, [truth.seconds(rows, 0)] * 20)
    for _ in range(100):
        curve.observe([8] * 50, [512] * 50, [truth.seconds(8, 0)] * 50)
    curve.fit()
    assert curve.coefficients.seconds(1, 64) == pytest.approx(1e-3, rel=0.2)


def knee_s(rows: float) -> float:
    """Reading the weights or arithmetic, whichever takes longer."""
    return max(4e-3 + 1e-4 * rows, 4e-4 * rows)


def bent(curve: BatchTimeCurve, rows: float) -> float:
    (size,) = size_of(np.array([rows]))
    return curve.coefficients.seconds(rows, 0.0) * float(curve.bends_B[size])


def test_a_curve_is_bent_to_what_was_seen_of_each_size() -> None:
    curve = BatchTimeCurve()
    sizes = [1, 2, 4, 8, 16, 32, 64, 128] * 20
    curve.observe(sizes, [0.0] * len(sizes), [knee_s(rows) for rows in sizes])
    curve.fit()
    errors = [curve.coefficients.seconds(rows, 0.0) / knee_s(rows) - 1.0 for rows in sizes]
    assert max(map(abs, errors)) > 0.1  # no line fits
    for rows in sizes:
        assert bent(curve, rows) == pytest.approx(knee_s(rows), rel=0.01)


def test_sizes_that_were_not_seen_are_like_those_beside_them() -> None:
    curve = BatchTimeCurve()
    sizes = [2, 8, 32] * 20
    curve.observe(sizes, [0.0] * len(sizes), [knee_s(rows) for rows in sizes])
    curve.fit()
    two, eight, most = (float(curve.bends_B[size]) for size in (1, 3, 5))
    assert curve.bends_B[0] == two
    assert curve.bends_B[2] == pytest.approx((two + eight) / 2)
    assert set(curve.bends_B[5:]) == {most}


def test_a_curve_is_straight_before_reports() -> None:
    assert set(BatchTimeCurve().bends_B) == {1.0}
