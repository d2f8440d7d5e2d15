"""When a team pauses."""

from __future__ import annotations

from core.engine.attendance import ALONE, Attendance


def test_members_who_are_there_go_on_together() -> None:
    attendance = Attendance()
    for cpu_ns in [900, 400, 900, 900] * 50:
        assert attendance.allows_team()
        attendance.note(wall_ns=1000, least_cpu_ns=cpu_ns)


def test_a_team_that_often_waits_for_a_member_pauses_and_is_tried_again() -> None:
    attendance = Attendance()
    num_tried = 0
    while attendance.allows_team():
        attendance.note(wall_ns=1000, least_cpu_ns=400)
        num_tried += 1
    assert num_tried < 64
    assert [attendance.allows_team() for _ in range(ALONE)] == [False] * (ALONE - 1) + [True]
    attendance.note(wall_ns=1000, least_cpu_ns=400)
    assert attendance.allows_team()


def test_more_than_all_of_the_time_is_no_merit() -> None:
    attendance = Attendance()
    for _ in range(1000):
        attendance.note(wall_ns=100, least_cpu_ns=1000)
    for _ in range(64):
        attendance.note(wall_ns=1000, least_cpu_ns=400)
    assert not attendance.allows_team()
