"""How many micro-batches decodes are cut into, by what was measured of one alone."""

from __future__ import annotations

import pytest

from core.pipeline.batch_time import DEFAULT_PRIOR
from core.pipeline.policy import InFlightPolicy, PolicySettings
from core.pipeline.stage_times import COST_OF_TEAM, StageTimes

SIZES = [1, 2, 4, 8, 16, 32, 64] * 20
CONTEXT = 64.0


LONG_CONTEXT, PAIR_S = 1000.0, 1e-7


def alone_s(rows: float) -> float:
    """Half of a small model, both cores for one micro-batch: memory, then arithmetic."""
    return max(2.6e-3 + 1.2e-4 * rows, 2.3e-4 * rows)


def beside_s(rows: float) -> float:
    """With one core, while the other one computes the other half."""
    return 2.0 / COST_OF_TEAM * alone_s(rows)


def policy_of(*, gain_alone: float, knows_overlap: bool) -> InFlightPolicy:
    """One that knows two stages' times alone, and perhaps those beside others."""
    times_S = [StageTimes(DEFAULT_PRIOR, contention=1.3, gain_alone=gain_alone) for _ in range(2)]
    for times in times_S:
        pairs = [CONTEXT * rows for rows in SIZES]
        seconds = [alone_s(rows) for rows in SIZES]
        times.observe(overlapped=False, rows=SIZES, pairs=pairs, seconds=seconds)
        if knows_overlap:
            seconds = [beside_s(rows) for rows in SIZES]
            times.observe(overlapped=True, rows=SIZES, pairs=pairs, seconds=seconds)
    policy = InFlightPolicy(times_S, PolicySettings(), gains_alone=[gain_alone] * 2)
    policy.set_context(CONTEXT)
    policy.refresh()
    return policy


def chosen(num_sequences: int, *, gain_alone: float, knows_overlap: bool = True) -> int:
    policy = policy_of(gain_alone=gain_alone, knows_overlap=knows_overlap)
    return policy.decode_target(num_sequences)


@pytest.mark.parametrize("num_sequences", [2, 8, 16])
def test_few_rows_have_the_machine_for_themselves(num_sequences: int) -> None:
    assert chosen(num_sequences, gain_alone=2.0) == 1


def test_a_guess_of_times_beside_others_is_put_to_the_test_unless_it_is_clear() -> None:
    assert chosen(2, gain_alone=2.0, knows_overlap=False) == 1
    assert chosen(24, gain_alone=2.0, knows_overlap=False) > 1 == chosen(24, gain_alone=2.0)


@pytest.mark.parametrize("knows_overlap", [False, True])
@pytest.mark.parametrize("num_sequences", [64, 128])
def test_rows_beyond_the_knee_overlap(num_sequences: int, knows_overlap: bool) -> None:
    assert chosen(num_sequences, gain_alone=2.0, knows_overlap=knows_overlap) > 1


def test_stages_of_machines_of_their_own_overlap_sooner() -> None:
    assert chosen(24, gain_alone=1.0, knows_overlap=False) > 1 == chosen(24, gain_alone=2.0)


def test_no_team_is_faster_than_its_threads_in_contexts_where_none_was_alone() -> None:
    times_S = [StageTimes(DEFAULT_PRIOR, contention=1.3, gain_alone=2.0) for _ in range(2)]
    for times in times_S:
        times.observe(
            overlapped=False, rows=SIZES, pairs=[0.0] * len(SIZES), seconds=[*map(alone_s, SIZES)]
        )
        pairs = [LONG_CONTEXT * rows for rows in SIZES]
        seconds = [beside_s(rows) + PAIR_S * LONG_CONTEXT * rows for rows in SIZES]
        times.observe(overlapped=True, rows=SIZES, pairs=pairs, seconds=seconds)
    policy = InFlightPolicy(times_S, PolicySettings(), gains_alone=[2.0, 2.0])
    policy.set_context(LONG_CONTEXT)
    policy.refresh()
    assert policy.decode_target(64) > 1


@pytest.mark.parametrize("num_decodes", [0, 2, 64])
def test_chunks_go_with_decodes_that_overlap(num_decodes: int) -> None:
    """The second stage has a little less to do, so that chunks by themselves go one by one."""
    times_S = [StageTimes(DEFAULT_PRIOR, contention=1.3, gain_alone=2.0) for _ in range(2)]
    for times, row_s in zip(times_S, (4e-4, 3.4e-4), strict=True):
        pairs = [CONTEXT * rows for rows in SIZES]
        for overlapped, factor in ((False, COST_OF_TEAM / 2.0), (True, 1.0)):
            seconds = [factor * (1e-3 + row_s * rows) for rows in SIZES]
            times.observe(overlapped=overlapped, rows=SIZES, pairs=pairs, seconds=seconds)
    policy = InFlightPolicy(times_S, PolicySettings(), gains_alone=[2.0, 2.0])
    plan = policy.prefill_plan(
        backlog_rows=4096, num_decodes=num_decodes, free_kv=1.0, max_rows=512
    )
    assert (num_decodes == 64) == (plan.in_flight > 1)
