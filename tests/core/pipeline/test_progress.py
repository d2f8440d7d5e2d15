"""A replica that lives and does nothing is found out, and no other is blamed for it."""

from __future__ import annotations

import pytest

from core.pipeline.actions import DropReplica
from core.pipeline.batch_time import Coefficients
from core.pipeline.events import StageReported, Tick
from core.pipeline.policy import PolicySettings
from core.pipeline.settings import SchedulerSettings
from tests.support.exact_pipeline import ExactPipeline

PROMPT = list(range(100, 122))


def pipeline_of(*num_replicas_S: int) -> ExactPipeline:
    """With requests in flight on all paths."""
    policy = PolicySettings(prior=Coefficients(1e-3, 1e-5, 0.0))
    pipeline = ExactPipeline(
        *num_replicas_S, settings=SchedulerSettings(micro_batch_timeout_s=10.0, policy=policy)
    )
    for number in range(4):
        pipeline.ask([number] * 20, max_tokens=200)
    return pipeline


def dropped(pipeline: ExactPipeline, *, after_s: float) -> list[int]:
    """Who is given up when the others have done what they can for so long."""
    given_up: list[int] = []
    end_s = pipeline.now_s + after_s
    while pipeline.now_s < end_s and not given_up:
        for replica in pipeline.replicas:
            replica.report()
        for _ in range(10):
            pipeline.turn()
        pipeline.now_s += 0.2
        actions = pipeline.handle(Tick())
        given_up += [action.replica_id for action in actions if isinstance(action, DropReplica)]
    return given_up


def stop(pipeline: ExactPipeline, stage: int) -> int:
    """Stops a replica, and lets the others do what they can."""
    replica = pipeline.exact.replicas[pipeline.batches[-1].path[stage]]
    replica.is_stopped = True
    for _ in range(50):
        pipeline.turn()
    return replica.id


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_first_one_that_has_not_performed_is_given_up_and_all_go_on(stage: int) -> None:
    pipeline = pipeline_of(2, 2, 2)
    stopped = stop(pipeline, stage)
    assert dropped(pipeline, after_s=9.5) == []
    assert dropped(pipeline, after_s=1.0) == [stopped]
    pipeline.finish()
    assert pipeline.answers() == [True] * 4


def test_one_that_waits_for_another_paths_micro_batch_is_not_to_blame() -> None:
    """Both first stages feed one second stage: what hangs there hangs because of the first."""
    pipeline = pipeline_of(2, 1)
    for _ in range(7):
        pipeline.turn()
    stopped = stop(pipeline, 0)
    assert dropped(pipeline, after_s=11.0) == [stopped]


def test_nothing_is_given_up_while_nothing_is_in_flight() -> None:
    pipeline = ExactPipeline(1, 1)
    pipeline.ask(PROMPT)
    pipeline.finish()
    assert dropped(pipeline, after_s=30.0) == []


def test_once_times_are_known_a_stall_is_noticed_much_sooner() -> None:
    pipeline = pipeline_of(1, 1)
    for _ in range(100):
        pipeline.turn()
    for replica in pipeline.replicas:
        rows = replica._rows
        replica._rows = []
        pipeline.handle(
            StageReported(replica_id=replica.id, batch_rows=rows, batch_seconds=[1e-3] * len(rows))
        )
    stopped = stop(pipeline, 1)
    assert dropped(pipeline, after_s=1.5) == []
    assert dropped(pipeline, after_s=1.0) == [stopped]


def test_who_was_held_up_itself_blames_nobody() -> None:
    pipeline = pipeline_of(1, 1)
    pipeline.now_s += 100.0
    assert not any(isinstance(action, DropReplica) for action in pipeline.handle(Tick()))
    pipeline.finish()
    assert pipeline.answers() == [True] * 4
