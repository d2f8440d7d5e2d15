"""The cost of a row is the slope of round trips over rows."""

from __future__ import annotations

import random

import pytest

from core.pipeline.row_cost import RowCost


def observed(times: list[tuple[int, float]]) -> RowCost:
    cost = RowCost()
    for rows, seconds in times:
        cost.observe(rows, seconds)
    return cost


def test_the_slope_is_found_among_noise() -> None:
    rng = random.Random(1)
    rows = [rng.randrange(1, 9) for _ in range(400)]
    cost = observed([(count, 6e-3 + 4e-4 * count + rng.gauss(0.0, 2e-4)) for count in rows])
    assert cost.row_s == pytest.approx(4e-4, rel=0.15)


def test_micro_batches_of_one_size_tell_nothing() -> None:
    assert observed([(1, 6e-3)] * 100).row_s is None
    assert observed([(1, 6e-3), (4, 7e-3)]).row_s is None


def test_what_rows_cost_of_late_counts_most() -> None:
    before = [(count, 1e-3 * count) for count in (1, 5)] * 200
    after = [(count, 3e-3 * count) for count in (1, 5)] * 200
    assert observed(before + after).row_s == pytest.approx(3e-3, rel=0.1)


def test_a_row_never_costs_less_than_nothing() -> None:
    assert observed([(1, 8e-3), (5, 6e-3)] * 50).row_s == 0.0
