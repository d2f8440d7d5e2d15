"""How many micro-batches decodes are cut into, by what was measured of one alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from core.pipeline.batch_time import DEFAULT_PRIOR, Coefficients
from core.pipeline.policy import InFlightPolicy, PolicySettings
from core.pipeline.stage_times import COST_OF_TEAM, StageTimes

SIZES = [1, 2, 4, 8, 16, 32, 64] * 20
CONTEXT, LONG_CONTEXT = 64.0, 1000.0
PAIR_S = 1e-7


def alone_s(rows: float) -> float:
    """Half of a small model, both cores for one micro-batch: memory, then arithmetic."""
    return max(2.6e-3 + 1.2e-4 * rows, 2.3e-4 * rows)


def beside_s(rows: float) -> float:
    """With one core, while the other one computes the other half."""
    return 2.0 / COST_OF_TEAM * alone_s(rows)


def two_stages(gain_alone: float) -> list[StageTimes]:
    """Of which nothing is known yet."""
    return [StageTimes(DEFAULT_PRIOR, contention=1.3, gain_alone=gain_alone) for _ in range(2)]


def observe(
    times: StageTimes,
    seconds: Callable[[float], float],
    *,
    overlapped: bool,
    context: float = CONTEXT,
) -> None:
    """Micro-batches of all sizes, which take `seconds` for their rows."""
    times.observe(
        overlapped=overlapped,
        rows=SIZES,
        pairs=[context * rows for rows in SIZES],
        seconds=[seconds(rows) for rows in SIZES],
    )


def policy_of(
    times_S: Sequence[StageTimes], *, gain_alone: float, context: float = CONTEXT
) -> InFlightPolicy:
    policy = InFlightPolicy(times_S, PolicySettings(), gains_alone=[gain_alone] * len(times_S))
    policy.set_context(context)
    policy.refresh()
    return policy


def chosen(num_sequences: int, *, gain_alone: float, knows_overlap: bool = True) -> int:
    """By a policy that knows the stages' times alone, and perhaps those beside others."""
    times_S = two_stages(gain_alone)
    for times in times_S:
        observe(times, alone_s, overlapped=False)
        if knows_overlap:
            observe(times, beside_s, overlapped=True)
    return policy_of(times_S, gain_alone=gain_alone).decode_target(num_sequences)


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
    times_S = two_stages(2.0)
    for times in times_S:
        observe(times, alone_s, overlapped=False, context=0.0)
        observe(
            times,
            lambda rows: beside_s(rows) + PAIR_S * LONG_CONTEXT * rows,
            overlapped=True,
            context=LONG_CONTEXT,
        )
    assert policy_of(times_S, gain_alone=2.0, context=LONG_CONTEXT).decode_target(64) > 1


def test_a_sibling_begins_with_the_same_times_and_its_own_gain() -> None:
    times = two_stages(2.0)[0]
    observe(times, alone_s, overlapped=False)
    sibling = times.for_sibling(gain_alone=1.0)
    for one in (times, sibling):
        one.fit()
    assert sibling.alone == times.alone
    assert times.overlapped.per_row_s == pytest.approx(2.0 / COST_OF_TEAM * times.alone.per_row_s)
    assert sibling.overlapped.per_row_s == times.alone.per_row_s
    times.become_like(sibling)
    times.fit()
    assert times.overlapped.per_row_s > sibling.overlapped.per_row_s


@pytest.mark.parametrize("num_decodes", [0, 2, 64])
def test_chunks_go_with_decodes_that_overlap(num_decodes: int) -> None:
    """The second stage has a little less to do, so that chunks by themselves go one by one."""
    times_S = two_stages(2.0)
    for times, row_s in zip(times_S, (4e-4, 3.4e-4), strict=True):
        for overlapped, factor in ((False, COST_OF_TEAM / 2.0), (True, 1.0)):
            line = Coefficients(factor * 1e-3, factor * row_s, 0.0)
            observe(times, lambda rows, line=line: line.seconds(rows, 0.0), overlapped=overlapped)
    policy = policy_of(times_S, gain_alone=2.0)
    plan = policy.prefill_plan(
        backlog_rows=4096, num_decodes=num_decodes, free_kv=1.0, max_rows=512
    )
    assert (num_decodes == 64) == (plan.in_flight > 1)
