"""The real scheduler on simulated pipelines: the policy's promises, in virtual time."""

from __future__ import annotations

import pytest

from core.pipeline.batch_time import Coefficients
from core.pipeline.simulate import SimulatedRequest, SimulationSettings, simulate
from tests.support.simulated_load import closed_loop, twice_the_stages

# Half of a 135M model on one core, as measured.
HALF = Coefficients(2e-3, 1.8e-4, 1e-7)


@pytest.mark.parametrize("num_stages", [2, 4, 8, 16, 32, 64])
def test_the_bottleneck_is_97_percent_busy_with_work_for_twice_the_stages(num_stages: int) -> None:
    assert max(twice_the_stages(num_stages).busy_S) >= 0.97


def test_one_stream_keeps_one_micro_batch_in_flight() -> None:
    report = closed_loop(1, (HALF, HALF), hop_s=5e-4)
    assert report.mean_in_flight == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("num_streams", [32, 64, 128])
def test_two_stages_with_many_streams_keep_two_or_three_in_flight(num_streams: int) -> None:
    report = closed_loop(num_streams, (HALF, HALF), hop_s=5e-4, jitter=0.1)
    assert 1.9 < report.mean_in_flight < 3.1
    assert min(report.busy_S) > 0.9


def test_memory_bound_stages_get_one_big_micro_batch() -> None:
    """Where rows are free, cutting the batch would only read the weights again."""
    report = closed_loop(8, (Coefficients(10e-3, 1e-5, 0.0),) * 2)
    assert report.mean_in_flight == pytest.approx(1, abs=0.05)
    assert report.mean_rows == pytest.approx(8, abs=0.1)


def test_slow_hops_are_filled_with_more_micro_batches() -> None:
    near = closed_loop(64, (HALF, HALF), hop_s=1e-4)
    far = closed_loop(64, (HALF, HALF), hop_s=20e-3)
    assert far.mean_in_flight > near.mean_in_flight + 1


def test_a_slow_stage_is_the_one_kept_busy() -> None:
    slow = Coefficients(4e-3, 3.6e-4, 1e-7)
    report = closed_loop(64, (HALF, slow, HALF))
    assert report.busy_S[1] > 0.97
    assert report.busy_S[0] < 0.7


def test_long_prompts_do_not_stall_decodes() -> None:
    """No token waits longer than a few micro-batches of bounded time, however long the prompts."""
    decodes = [SimulatedRequest(arrival_s=0.0, num_prompt=16, num_output=600)] * 16
    prompts = [SimulatedRequest(arrival_s=1.0, num_prompt=4000, num_output=10)] * 8
    report = simulate(decodes + prompts, SimulationSettings(stages=(HALF, HALF), warm_up_s=0.5))
    assert report.num_ended == 24
    assert report.longest_gap_s < 5 * 0.05


def test_chunks_of_one_prompt_fill_the_pipeline() -> None:
    """A prompt alone takes far less than its chunks one after the other."""
    prompt = SimulatedRequest(arrival_s=0.0, num_prompt=4000, num_output=1)
    stages = (HALF,) * 4
    report = simulate([prompt], SimulationSettings(stages=stages))
    one_after_the_other = sum(stage.seconds(4000, 4000 * 2000) for stage in stages)
    assert report.time_to_first_token_s[0] < 0.5 * one_after_the_other


def test_requests_that_do_not_fit_together_are_preempted_and_all_end() -> None:
    requests = [
        SimulatedRequest(arrival_s=0.01 * n, num_prompt=30, num_output=200) for n in range(20)
    ]
    report = simulate(requests, SimulationSettings(stages=(HALF, HALF), num_kv_blocks=60))
    assert report.num_ended == 20
    assert report.num_preemptions > 0
    assert len(report.time_to_first_token_s) == 20


def test_equal_seeds_give_equal_reports() -> None:
    assert closed_loop(16, (HALF, HALF), cycles=20) == closed_loop(16, (HALF, HALF), cycles=20)
