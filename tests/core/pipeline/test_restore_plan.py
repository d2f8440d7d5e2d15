"""After its pieces every stage has everything, and nothing is asked of who lacks it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.pipeline.restore_plan import plan_restore


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 12))
def test_pieces_bring_every_stage_up_to_what_has_landed(held_S: list[int], landed: int) -> None:
    held_S = [min(held, landed) for held in held_S]
    has_S = list(held_S)
    for first_stage, end_stage, first, end in plan_restore(held_S, landed):
        assert first < end
        assert has_S[first_stage:end_stage] == [first] * (end_stage - first_stage)
        assert first_stage == 0 or has_S[first_stage - 1] >= end
        has_S[first_stage:end_stage] = [end] * (end_stage - first_stage)
    assert has_S == [landed] * len(held_S)


def test_neighbours_that_lack_the_same_share_a_piece() -> None:
    assert list(plan_restore([9, 0, 0, 9, 0], 9)) == [(1, 3, 0, 9), (4, 5, 0, 9)]


def test_who_found_some_sends_it_to_the_next_who_did_not() -> None:
    assert list(plan_restore([9, 4, 0], 9)) == [(2, 3, 0, 4), (1, 3, 4, 9)]


def test_where_nothing_is_missing_there_are_no_pieces() -> None:
    assert list(plan_restore([9, 9], 9)) == []
