"""Replicas that leave while others go on, and the weights that a sequence ends with."""

from __future__ import annotations

import pytest

from core.errors import Unavailable
from core.pipeline.actions import EmitTokens
from core.pipeline.cut import Cut
from core.pipeline.events import CutChosen, ReplicaDraining, Tick
from core.pipeline.settings import SchedulerSettings
from tests.support.exact_pipeline import ExactPipeline
from tests.support.fake_engine import completion

PROMPT = list(range(100, 122))


def generating(pipeline: ExactPipeline, num_requests: int = 1) -> ExactPipeline:
    """With requests that have generated some of their 20 tokens."""
    for number in range(num_requests):
        pipeline.ask([*PROMPT, number], max_tokens=20)
    while not all(len(asked.output) > 2 for asked in pipeline.asked.values()):
        pipeline.turn()
    return pipeline


@pytest.mark.parametrize("moves", [False, True])
def test_a_draining_replica_gets_no_new_sequences(moves: bool) -> None:
    pipeline = ExactPipeline(1, 2)
    draining, staying = pipeline.of_stage(1)
    pipeline.handle(ReplicaDraining(replica_id=draining, moves=moves))
    assert pipeline.scheduler.is_drained(draining)
    for number in range(4):
        pipeline.ask([number] * 9)
    pipeline.finish()
    assert {batch.path[1] for batch in pipeline.batches} == {staying}


def test_sequences_end_where_they_are() -> None:
    pipeline = generating(ExactPipeline(1, 2))
    draining = pipeline.batches[-1].path[1]
    pipeline.handle(ReplicaDraining(replica_id=draining))
    assert not pipeline.scheduler.is_drained(draining)
    assert pipeline.scheduler.num_sequences_on(draining) == 1
    pipeline.finish()
    assert pipeline.batches[-1].path[1] == draining
    assert pipeline.scheduler.is_drained(draining)
    assert pipeline.answers() == [True]


def test_sequences_leave_at_once_where_they_shall_and_nothing_is_computed_twice() -> None:
    pipeline = generating(ExactPipeline(1, 2), num_requests=3)
    draining = pipeline.batches[-1].path[1]
    pipeline.handle(ReplicaDraining(replica_id=draining, moves=True))
    while not pipeline.scheduler.is_drained(draining):
        assert pipeline.turn()
    assert pipeline.open_requests
    pipeline.finish()
    assert pipeline.answers() == [True] * 3
    assert pipeline.exact.replicas[draining].engine.sequences == {}
    whole = [batch for batch in pipeline.batches if len(batch.path) == 2 and not batch.replays]
    # The first prompt, what the others do not share with it, and 19 tokens of each.
    assert sum(sum(batch.num_rows_R) for batch in whole) == 23 + 2 * 3 + 3 * 19


def test_without_another_replica_they_end_where_they_are() -> None:
    pipeline = generating(ExactPipeline(1, 1))
    (draining,) = pipeline.of_stage(1)
    pipeline.handle(ReplicaDraining(replica_id=draining, moves=True))
    pipeline.finish()
    assert pipeline.answers() == [True]
    assert pipeline.scheduler.is_drained(draining)


def test_a_spare_serves_only_while_no_other_replica_does() -> None:
    pipeline = ExactPipeline(1, 1)
    (ordinary,) = pipeline.of_stage(1)
    spare = pipeline.open(1, is_spare=True)
    generating(pipeline, num_requests=3)
    assert {batch.path[1] for batch in pipeline.batches} == {ordinary}
    pipeline.kill(ordinary)
    pipeline.finish()
    assert pipeline.batches[-1].path[1] == spare
    assert pipeline.answers() == [True] * 3


# --- weights


def choose_new(pipeline: ExactPipeline) -> None:
    cut = Cut((pipeline.part(0), pipeline.part(1, weights="new")))
    pipeline.handle(CutChosen(cut=cut))


def updating() -> tuple[ExactPipeline, int, int]:
    """A request on the old weights of stage 1, and one on the new."""
    pipeline = ExactPipeline(1, num_stages=2)
    old = pipeline.open(1, weights="old")
    new = pipeline.open(1, weights="new")
    pipeline.ask(PROMPT, max_tokens=20)
    for _ in range(9):
        pipeline.turn()
    choose_new(pipeline)
    pipeline.ask(PROMPT, max_tokens=20)
    for _ in range(9):
        pipeline.turn()
    return pipeline, old, new


def test_a_sequence_ends_with_the_weights_that_it_began_with() -> None:
    pipeline, old, new = updating()
    assert pipeline.scheduler.num_sequences_on(old) == 1
    assert pipeline.scheduler.num_sequences_on(new) == 1
    pipeline.handle(ReplicaDraining(replica_id=old, moves=True))
    pipeline.finish()
    assert pipeline.answers() == [True, True]
    assert pipeline.scheduler.num_failovers == 0
    assert pipeline.scheduler.is_drained(old)


def test_prefixes_are_not_shared_between_weights() -> None:
    """The first stage is the same, yet what it made goes into the others' weights."""
    pipeline, _, _ = updating()
    pipeline.finish()
    usages = [asked.usage for asked in pipeline.asked.values()]
    assert [usage.cached_tokens for usage in usages if usage is not None] == [0, 0]


def test_other_weights_take_over_no_sequence() -> None:
    pipeline, old, new = updating()
    pipeline.kill(old)
    pipeline.finish()
    assert pipeline.answers() == [False, True]
    assert pipeline.asked[0].is_open
    pipeline.open(1, weights="old")
    pipeline.finish()
    assert pipeline.answers() == [True, True]
    assert pipeline.scheduler.num_sequences_on(new) == 0


def test_sequences_whose_weights_are_gone_for_good_end_while_others_go_on() -> None:
    pipeline, old, _ = updating()
    pipeline.kill(old)
    pipeline.now_s += 1e10
    pipeline.handle(Tick())
    assert isinstance(pipeline.asked[0].ends[0], Unavailable)
    assert pipeline.asked[1].is_open


def resumed(pipeline: ExactPipeline, *, weights: str) -> None:
    """A request with five tokens of output, which another coordinator had of these weights."""
    cut = Cut((pipeline.part(0), pipeline.part(1, weights=weights)))
    begun = PROMPT + completion(PROMPT, 5)
    pipeline.ask(begun, num_output_tokens=5, max_tokens=12, began_on=cut)


@pytest.mark.parametrize("weights", ["old", "new"])
def test_output_of_another_coordinator_goes_on_with_the_weights_it_came_from(weights: str) -> None:
    pipeline = ExactPipeline(1, num_stages=2)
    replica_of = {name: pipeline.open(1, weights=name) for name in ("old", "new")}
    choose_new(pipeline)
    pipeline.handle(ReplicaDraining(replica_id=replica_of["old"], moves=False))
    resumed(pipeline, weights=weights)
    pipeline.finish()
    assert pipeline.answers() == [True]
    assert {batch.path[1] for batch in pipeline.batches} == {replica_of[weights]}


def test_output_whose_weights_are_gone_waits_for_them_and_then_ends() -> None:
    pipeline = ExactPipeline(1, 1)
    resumed(pipeline, weights="gone")
    pipeline.ask(PROMPT)
    pipeline.finish()
    assert pipeline.answers() == [False, True]
    pipeline.now_s += 1e10
    pipeline.handle(Tick())
    assert isinstance(pipeline.asked[0].ends[0], Unavailable)


def test_first_tokens_and_no_others_tell_what_computed_them() -> None:
    pipeline = ExactPipeline(1, 1)
    pipeline.ask(PROMPT, max_tokens=4)
    told = []
    while pipeline.open_requests:
        pipeline.turn()
        told += [action.began_on for action in pipeline.actions if isinstance(action, EmitTokens)]
    assert told == [Cut((pipeline.part(0), pipeline.part(1))), None, None, None]


def test_without_a_replica_of_the_chosen_weights_new_requests_wait() -> None:
    pipeline = ExactPipeline(1, 1, settings=SchedulerSettings(lost_limit_s=1e9))
    choose_new(pipeline)
    pipeline.ask(PROMPT)
    assert not pipeline.scheduler.is_ready
    pipeline.open(1, weights="new")
    pipeline.finish()
    assert pipeline.answers() == [True]
