"""Steady load on a simulated pipeline."""

from __future__ import annotations

from core.pipeline.batch_time import Coefficients
from core.pipeline.settings import SchedulerSettings
from core.pipeline.simulate import (
    SimulatedRequest,
    SimulationReport,
    SimulationSettings,
    simulate,
)


def closed_loop(
    num_streams: int,
    stages: tuple[Coefficients, ...],
    *,
    hop_s: float = 0.0,
    jitter: float = 0.2,
    cycles: int = 100,
) -> SimulationReport:
    """`num_streams` requests from the start, measured when all generate."""
    rows = num_streams / (2 * len(stages))
    cycle_s = 2 * len(stages) * max(stage.seconds(rows, 0) for stage in stages)
    half_s = max(cycles * cycle_s / 2, 4.0)  # the policy looks at reports twice a second
    request = SimulatedRequest(arrival_s=0.0, num_prompt=16, num_output=100_000)
    return simulate(
        [request] * num_streams,
        SimulationSettings(
            stages=stages,
            hop_s=hop_s,
            jitter=jitter,
            warm_up_s=half_s,
            until_s=2 * half_s,
            num_kv_blocks=20_000,
            scheduler=SchedulerSettings(max_waiting=100_000),
        ),
    )


def twice_the_stages(num_stages: int) -> SimulationReport:
    """Equal stages, each time varying by uniform +-20 %, and work for 2 micro-batches a stage."""
    stage = Coefficients(0.0, 1e-3, 0.0)
    cycles = 100 if num_stages < 32 else 60
    return closed_loop(2 * num_stages * 8, (stage,) * num_stages, cycles=cycles)
