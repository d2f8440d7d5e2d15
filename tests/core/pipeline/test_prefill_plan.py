"""Whether chunks of prompts overlap or go one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from core.pipeline.batch_time import DEFAULT_PRIOR, Coefficients
from core.pipeline.policy import InFlightPolicy, PolicySettings
from core.pipeline.stage_times import StageTimes

BACKLOG = 4096  # rows
CHUNKS = [16.0, 64.0, 128.0, 256.0] * 20


def times_of(truth: Coefficients) -> StageTimes:
    """What is known of a stage that has computed chunks beside others."""
    times = StageTimes(DEFAULT_PRIOR, contention=1.3)
    pairs = [300.0 * rows for rows in CHUNKS]
    seconds = [truth.seconds(*one) for one in zip(CHUNKS, pairs, strict=True)]
    times.observe(overlapped=True, rows=CHUNKS, pairs=pairs, seconds=seconds)
    return times


def chunks_in_flight(row_s: Sequence[float], gains_alone: Sequence[float]) -> int:
    """Of a backlog of prompts, on stages that take so long for a row."""
    policy = InFlightPolicy(
        [times_of(Coefficients(4e-3, seconds, 2e-7)) for seconds in row_s],
        PolicySettings(),
        gains_alone=gains_alone,
    )
    plan = policy.prefill_plan(backlog_rows=BACKLOG, num_decodes=0, free_kv=1.0, max_rows=512)
    return plan.in_flight


def test_on_machines_of_their_own_stages_compute_chunks_at_the_same_time() -> None:
    assert chunks_in_flight([4e-4, 2.6e-4], [1.0, 1.0]) > 1


def test_uneven_stages_that_share_a_machine_take_it_in_turns() -> None:
    assert chunks_in_flight([4e-4, 2.6e-4], [2.0, 2.0]) == 1
    assert chunks_in_flight([2.6e-4, 4e-4], [2.0, 2.0]) == 1


def test_even_stages_that_share_a_machine_compute_at_the_same_time() -> None:
    assert chunks_in_flight([3e-4, 3e-4], [2.0, 2.0]) > 1


def test_a_few_more_threads_do_not_make_up_for_waiting() -> None:
    assert chunks_in_flight([4e-4, 2.6e-4], [8 / 6, 8 / 6]) > 1


@pytest.mark.parametrize("num_stages", [3, 8])
def test_more_stages_than_gained_threads_overlap(num_stages: int) -> None:
    row_s = [4e-4, *[2.6e-4] * (num_stages - 1)]
    assert chunks_in_flight(row_s, [1.5] * num_stages) > 1
