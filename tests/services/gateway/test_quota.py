"""How streams and tokens of a key are counted, by a clock that the test moves."""

from __future__ import annotations

from contextlib import suppress

import pytest

from core.errors import DeadlineExceeded, Exhausted, InvalidInput, Unavailable
from services.common.keys import KeyLimits
from services.gateway.quota import Quota


class Clock:
    """Stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quota(clock: Clock) -> Quota:
    limits = KeyLimits(tokens_per_minute=60, max_streams=2)
    return Quota(limits, subject="key 1", clock=clock)


def spend(quota: Quota, prompt: int, most: int, *, output: int | None = None) -> None:
    """A request from its beginning to its end."""
    with quota.request() as taken:
        taken.reserve(prompt, max_tokens=most)
        taken.num_output_tokens = most if output is None else output


def fail(quota: Quota, error: Exception, *, output: int = 0) -> None:
    """A request that ends with an error, 60 tokens reserved."""
    with suppress(type(error)), quota.request() as taken:
        taken.reserve(20, max_tokens=40)
        taken.num_output_tokens = output
        raise error


def delay_s(quota: Quota, prompt: int, most: int) -> float:
    with pytest.raises(Exhausted) as caught:
        spend(quota, prompt, most)
    assert caught.value.subject == "key 1"
    assert caught.value.retry_after_s is not None
    return caught.value.retry_after_s


def test_prompt_and_answer_are_taken_and_come_back_with_time(quota: Quota, clock: Clock) -> None:
    spend(quota, 20, 40)
    assert delay_s(quota, 1, 9) == pytest.approx(10)
    clock.now += 4
    assert delay_s(quota, 1, 9) == pytest.approx(6)
    clock.now += 6
    spend(quota, 1, 9)


def test_no_more_than_a_minutes_worth_gathers(quota: Quota, clock: Clock) -> None:
    clock.now += 3600
    spend(quota, 20, 40)
    assert delay_s(quota, 1, 9) == pytest.approx(10)


def test_what_was_not_generated_is_given_back(quota: Quota) -> None:
    spend(quota, 20, 40, output=5)
    spend(quota, 20, 15)
    assert delay_s(quota, 1, 9) == pytest.approx(10)


def test_open_requests_hold_what_they_may_yet_generate(quota: Quota) -> None:
    with quota.request() as taken:
        taken.reserve(20, max_tokens=40)
        assert delay_s(quota, 1, 9) == pytest.approx(10)


@pytest.mark.parametrize(
    ("error", "left"),
    [(Unavailable("gone"), 60), (Exhausted("full"), 60), (DeadlineExceeded("late"), 40)],
)
def test_a_prompt_is_given_back_where_the_mesh_did_not_answer(
    quota: Quota, error: Exception, left: int
) -> None:
    fail(quota, error)
    spend(quota, left - 1, 1)
    assert delay_s(quota, 1, 1) == pytest.approx(2)


def test_what_was_answered_before_the_mesh_failed_counts(quota: Quota) -> None:
    fail(quota, Unavailable("gone"), output=10)
    spend(quota, 20, 10)
    assert delay_s(quota, 1, 1) == pytest.approx(2)


def test_a_request_that_can_never_pass_is_wrong_and_not_early(quota: Quota) -> None:
    with pytest.raises(InvalidInput, match="61"), quota.request() as taken:
        taken.reserve(20, max_tokens=41)


def test_streams_are_counted_while_they_are_open(quota: Quota) -> None:
    with quota.request():
        with quota.request(), pytest.raises(Exhausted, match="allowed: 2"), quota.request():
            pass
        with quota.request():
            pass


def test_without_limits_nothing_is_refused() -> None:
    quota = Quota(KeyLimits(), subject="key 1")
    with quota.request(), quota.request() as taken:
        taken.reserve(10**9, max_tokens=10**9)
