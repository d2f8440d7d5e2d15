"""Replicas share the work by how fast they are: the real scheduler on simulated pipelines."""

from __future__ import annotations

import pytest

from core.pipeline.batch_time import Coefficients
from core.pipeline.settings import SchedulerSettings
from core.pipeline.simulate import (
    SimulatedFault,
    SimulatedRequest,
    SimulationReport,
    SimulationSettings,
    simulate,
)

# Half of a 135M model on one core, as measured.
HALF = Coefficients(2e-3, 1.8e-4, 1e-7)
Replicas = tuple[tuple[int, Coefficients], ...]


def slower(factor: float) -> Coefficients:
    return Coefficients(*(factor * seconds for seconds in HALF))


def saturated(
    *stages: Coefficients, further: Replicas = (), num_streams: int = 256
) -> SimulationReport:
    """More requests than can be served; so many at a time."""
    requests = [
        SimulatedRequest(arrival_s=0.01 * n, num_prompt=16, num_output=100 + n % 37)
        for n in range(20 * num_streams)
    ]
    return simulate(
        requests,
        SimulationSettings(
            stages=stages,
            further_replicas=further,
            hop_s=5e-4,
            jitter=0.1,
            warm_up_s=4.0,
            until_s=12.0,
            num_slots=num_streams,
            scheduler=SchedulerSettings(max_waiting=100_000),
        ),
    )


@pytest.mark.parametrize("slow_stage", [0, 1])
def test_a_second_replica_of_a_slow_stage_nearly_doubles_throughput(slow_stage: int) -> None:
    stages = [HALF, HALF]
    stages[slow_stage] = slower(4)
    alone = saturated(*stages)
    both = saturated(*stages, further=((slow_stage, slower(4)),))
    assert both.tokens_per_second > 1.75 * alone.tokens_per_second


def test_two_whole_pipelines_beside_each_other_do_nearly_twice_the_work() -> None:
    alone = saturated(HALF, HALF)
    both = saturated(HALF, HALF, further=((0, HALF), (1, HALF)))
    assert both.tokens_per_second > 1.75 * alone.tokens_per_second


@pytest.mark.parametrize("further", [((0, slower(10)),), ((1, slower(10)),)])
def test_a_replica_ten_times_slower_does_not_drag_its_sibling_down(further: Replicas) -> None:
    """Not even where both feed one second stage, which performs in order."""
    alone = saturated(HALF, HALF)
    both = saturated(HALF, HALF, further=further)
    assert both.tokens_per_second > 0.95 * alone.tokens_per_second


def test_a_slow_lane_beside_a_fast_one_takes_what_it_can() -> None:
    alone = saturated(HALF, HALF)
    both = saturated(HALF, HALF, further=((0, HALF), (1, slower(3))))
    assert both.tokens_per_second > 1.2 * alone.tokens_per_second


def test_a_request_goes_where_its_beginning_is_known() -> None:
    beginnings = [[100_000 * n + i for i in range(800)] for n in range(2)]
    requests = [
        SimulatedRequest(
            arrival_s=0.6 * n, num_prompt=810, num_output=4, token_ids=beginnings[n % 2] + [n] * 10
        )
        for n in range(12)
    ]
    further = ((0, HALF), (1, HALF))
    report = simulate(requests, SimulationSettings(stages=(HALF, HALF), further_replicas=further))
    assert report.cached_share == pytest.approx(10 * 800 / (12 * 810))


def test_every_request_ends_though_replicas_and_links_are_lost() -> None:
    requests = [
        SimulatedRequest(arrival_s=0.02 * n, num_prompt=100, num_output=60) for n in range(64)
    ]
    faults = (
        SimulatedFault(at_s=0.6, replica=1, back_s=1.5),  # its sibling takes over
        SimulatedFault(at_s=1.1, replica=0, back_s=2.0),  # there is none
        SimulatedFault(at_s=2.2, replica=0, downstream=2, back_s=2.4),
        SimulatedFault(at_s=2.5, replica=1),
    )
    settings = SimulationSettings(
        stages=(HALF, HALF), further_replicas=((1, HALF),), faults=faults, num_slots=32
    )
    report = simulate(requests, settings)
    assert report.num_ended == 64
    assert len(report.time_to_first_token_s) == 64
    assert report.num_failovers > 30
    assert report.num_restored_tokens > 0
