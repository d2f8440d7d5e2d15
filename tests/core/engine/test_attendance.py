"""When members of a team pause."""

from __future__ import annotations

import pytest

from core.engine.attendance import FIRST_PAUSE, LONGEST_PAUSE, Attendance


def compute(attendance: Attendance, *, most: int = 8, fits: int, times: int) -> list[int]:
    """So many micro-batches on a machine that has cores for `fits` members; who computed each."""
    chosen = []
    for _ in range(times):
        chosen.append(attendance.choose(most))
        cpu_ns = 950 if chosen[-1] <= fits else 400
        if chosen[-1] > 1:
            attendance.note(chosen[-1], wall_ns=1000, least_cpu_ns=cpu_ns)
    return chosen


def tries(chosen: list[int], *, most: int) -> list[int]:
    """How many micro-batches passed before each try of all members, but the first one."""
    starts = [
        index
        for index, count in enumerate(chosen)
        if count == most and index > 0 and chosen[index - 1] < most
    ]
    ends = [
        index
        for index, count in enumerate(chosen)
        if count < most and index > 0 and chosen[index - 1] == most
    ]
    return [start - end for start, end in zip(starts, ends, strict=False)]


def test_members_who_are_there_go_on_together() -> None:
    attendance = Attendance()
    for cpu_ns in [900, 400, 900, 900] * 50:
        assert attendance.choose(2) == 2
        attendance.note(2, wall_ns=1000, least_cpu_ns=cpu_ns)


def test_a_team_that_often_waits_for_a_member_is_halved_until_all_have_a_core() -> None:
    chosen = compute(Attendance(), fits=3, times=200)
    assert list(dict.fromkeys(chosen)) == [8, 4, 2]
    assert chosen.index(2) < 64


def test_of_a_team_of_two_one_goes_on_alone() -> None:
    assert compute(Attendance(), most=2, fits=1, times=100)[-1] == 1


@pytest.mark.parametrize("most", [2, 8])
def test_all_members_are_tried_again_less_and_less_often_while_that_fails(most: int) -> None:
    chosen = compute(Attendance(), most=most, fits=most // 2, times=4 * LONGEST_PAUSE)
    pauses = tries(chosen, most=most)
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert max(pauses) == LONGEST_PAUSE


def test_a_try_that_lasts_makes_the_next_pause_short_again() -> None:
    attendance = Attendance()
    compute(attendance, most=2, fits=1, times=8 * FIRST_PAUSE)
    compute(attendance, most=2, fits=2, times=16 * FIRST_PAUSE)
    pauses = tries(compute(attendance, most=2, fits=1, times=4 * FIRST_PAUSE), most=2)
    assert pauses[0] == FIRST_PAUSE


def test_more_than_all_of_the_time_is_no_merit() -> None:
    attendance = Attendance()
    for _ in range(1000):
        attendance.note(2, wall_ns=100, least_cpu_ns=1000)
    for _ in range(64):
        attendance.note(2, wall_ns=1000, least_cpu_ns=400)
    assert attendance.choose(2) == 1
