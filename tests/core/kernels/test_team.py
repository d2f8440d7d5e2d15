"""What members of a team share, and how they meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from core.kernels.compile import kernel
from core.kernels.memory import aligned_zeros
from core.kernels.team import BARRIER_WORDS, Team, meet, share
from core.kernels.vectors import address


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 64])
def test_members_share_everything_once_and_nearly_evenly(size: int, count: int) -> None:
    shares = [share(Team(member, size, 0), count) for member in range(size)]
    assert [n for one in shares for n in range(one.first, one.end)] == list(range(count))
    lengths = [one.end - one.first for one in shares]
    assert max(lengths) - min(lengths) <= 1


@kernel
def count_rounds(member, size, barrier, reached, num_rounds):  # type: ignore[no-untyped-def]
    """Returns how often somebody was not in the same round behind a meeting."""
    team = Team(member, size, address(barrier))
    num_wrong = 0
    for number in range(1, num_rounds + 1):
        reached[member, 0] = number
        meet(team)
        for other in range(size):
            num_wrong += reached[other, 0] != number
        meet(team)
    return num_wrong


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_nobody_goes_on_before_all_have_come_and_all_see_what_all_have_written(size: int) -> None:
    barrier = aligned_zeros((BARRIER_WORDS,), np.int64)
    reached = np.zeros((size, 8), np.int64)  # a cache line each
    count_rounds(0, 1, barrier, reached, 0)  # compiles
    with ThreadPoolExecutor(size) as threads:
        waits = [
            threads.submit(count_rounds, member, size, barrier, reached, 2000)
            for member in range(size)
        ]
        assert [wait.result() for wait in waits] == [0] * size
