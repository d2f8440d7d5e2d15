"""Short prompts do not wait for long ones, which are not starved: the real scheduler, simulated."""

from __future__ import annotations

import pytest

from core.pipeline.batch_time import Coefficients
from core.pipeline.simulate import SimulatedRequest, SimulationSettings, simulate

STAGES = (Coefficients(2e-3, 1e-3, 0.0),) * 2
LONG = 4000


def prompt(at_s: float, length: int, *, priority: int = 0) -> SimulatedRequest:
    return SimulatedRequest(arrival_s=at_s, num_prompt=length, num_output=1, priority=priority)


def first_tokens_s(*requests: SimulatedRequest) -> list[float]:
    """Seconds from each one's arrival."""
    report = simulate(requests, SimulationSettings(stages=STAGES))
    assert report.num_ended == len(requests)
    return list(report.time_to_first_token_s)


ALONE_S = first_tokens_s(prompt(0.0, LONG))[0]


def test_a_short_prompt_passes_one_that_is_being_computed() -> None:
    long_s, short_s = first_tokens_s(prompt(0.0, LONG), prompt(0.5, 40))
    assert short_s < 0.2 * ALONE_S
    assert long_s < 1.05 * ALONE_S


def test_a_short_prompt_passes_those_that_wait() -> None:
    *long_s, short_s = first_tokens_s(*[prompt(0.1 * n, LONG) for n in range(3)], prompt(0.5, 40))
    assert short_s < 0.2 * ALONE_S
    assert long_s == sorted(long_s)


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_flood_of_short_prompts_delays_long_ones_by_half_of_themselves(ahead: int) -> None:
    """It asks for more than there is time for; what is not passed is served in order."""
    flood = [prompt(0.05 + 0.2 * n, 500) for n in range(200)]
    seconds = first_tokens_s(*[prompt(0.01 * n, LONG) for n in range(ahead)], *flood)
    assert 1.3 * ALONE_S < seconds[0] < 1.6 * ALONE_S
    assert seconds[ahead - 1] < 1.6 * ahead * ALONE_S


def test_prompts_of_about_a_length_are_served_in_order_of_arrival() -> None:
    requests = [prompt(0.01 * n, length) for n, length in enumerate((900, 700, 500, 900, 600))]
    seconds = first_tokens_s(*requests)
    ends_s = [one.arrival_s + s for one, s in zip(requests, seconds, strict=True)]
    assert ends_s == sorted(ends_s)


def test_what_is_less_urgent_passes_nothing() -> None:
    urgent_s, short_s = first_tokens_s(prompt(0.0, LONG, priority=1), prompt(0.5, 40))
    assert urgent_s == pytest.approx(ALONE_S, rel=0.01)
    assert short_s > 0.8 * ALONE_S
