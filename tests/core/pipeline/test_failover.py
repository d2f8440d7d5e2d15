"""What is computed again when replicas and links are lost, and what is not: event by event."""

from __future__ import annotations

from itertools import accumulate

import pytest

from core.errors import DeadlineExceeded, Unavailable
from core.pipeline.actions import AbandonMicroBatches, FinishReason, RunMicroBatch
from core.pipeline.events import RequestCancelled, Tick
from core.pipeline.settings import SchedulerSettings
from tests.support.exact_pipeline import ExactPipeline

PROMPT = list(range(100, 122))


def generating(*num_replicas_S: int, num_tokens: int = 3, **fields: object) -> ExactPipeline:
    """A pipeline with one request that has generated some of its 20 tokens."""
    pipeline = ExactPipeline(*num_replicas_S)
    pipeline.ask(PROMPT, max_tokens=20, **fields)
    while len(pipeline.asked[0].output) < num_tokens:
        pipeline.turn()
    return pipeline


def used_in(pipeline: ExactPipeline, stage: int) -> int:
    """The replica of a stage that computed latest."""
    return pipeline.batches[-1].path[stage]


def restoring(pipeline: ExactPipeline) -> list[RunMicroBatch]:
    """Micro-batches of the latest turn that compute nothing new."""
    launched = [action for action in pipeline.actions if isinstance(action, RunMicroBatch)]
    return [batch for batch in launched if not any(batch.num_samples_R)]


def run_starts(batch: RunMicroBatch) -> list[int]:
    """Of each run of a micro-batch, the number of its first row."""
    return [0, *accumulate(batch.num_rows_R[:-1])]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_lost_stage_gets_what_the_stage_before_it_had_sent(stage: int) -> None:
    pipeline = generating(2, 2, 2)
    before = used_in(pipeline, stage - 1)
    pipeline.kill(used_in(pipeline, stage))
    (batch,) = restoring(pipeline)
    assert batch.replays
    assert batch.first_stage == stage - 1
    assert batch.path[0] == before
    assert len(batch.path) == 2
    assert batch.num_rows_R == [len(PROMPT) + 3 - 1]
    assert batch.token_ids_T == []
    pipeline.finish()
    assert pipeline.answers() == [True]


def test_a_lost_first_stage_computes_from_token_ids() -> None:
    pipeline = generating(2, 2, 2)
    pipeline.kill(used_in(pipeline, 0))
    (batch,) = restoring(pipeline)
    assert (batch.replays, batch.first_stage, len(batch.path)) == (False, 0, 1)
    assert batch.token_ids_T == PROMPT + pipeline.asked[0].output[:2]
    pipeline.finish()
    assert pipeline.answers() == [True]


def test_neighbours_that_are_lost_together_are_restored_together() -> None:
    pipeline = generating(2, 2, 2)
    for replica_id in pipeline.batches[-1].path[1:]:
        pipeline.kill(replica_id, tells=False)
    pipeline.tell()
    (batch,) = restoring(pipeline)
    assert (batch.replays, batch.first_stage, len(batch.path)) == (True, 0, 3)
    pipeline.finish()
    assert pipeline.answers() == [True]


def test_the_next_token_does_not_wait_for_the_restoring_to_end() -> None:
    pipeline = generating(1, 2)
    pipeline.kill(used_in(pipeline, 1))
    restore, decode = [a for a in pipeline.actions if isinstance(a, RunMicroBatch)]
    assert restore.replays
    assert decode.first_positions_R == [len(PROMPT) + 3 - 1]


@pytest.mark.parametrize(("priority", "expected"), [(0, [1, 2, 0]), (1, [0, 1, 2])])
def test_within_a_priority_who_has_least_to_restore_goes_on_first(
    priority: int, expected: list[int]
) -> None:
    pipeline = ExactPipeline(1, 1, max_rows=16)
    pipeline.open(0, is_spare=True)
    pipeline.ask([0] * 30, priority=priority, max_tokens=20)
    pipeline.ask([1] * 10, max_tokens=20)
    pipeline.ask([2] * 20, max_tokens=20)
    while any(len(asked.output) < 2 for asked in pipeline.asked.values()):
        pipeline.turn()
    num_before = len(pipeline.batches)
    pipeline.kill(used_in(pipeline, 0))
    pipeline.finish()
    restored = [batch for batch in pipeline.batches[num_before:] if not any(batch.num_samples_R)]
    begun = [batch.token_ids_T[run_start] for batch in restored for run_start in run_starts(batch)]
    assert list(dict.fromkeys(begun)) == expected
    assert pipeline.answers() == [True] * 3


def test_a_lost_replica_costs_the_others_nothing_but_what_was_in_flight() -> None:
    pipeline = generating(1, 2, 1)
    num_before = len(pipeline.batches)
    pipeline.kill(used_in(pipeline, 1))
    pipeline.finish()
    whole = [batch for batch in pipeline.batches[num_before:] if len(batch.path) == 3]
    # 20 tokens in all, 3 are there: one of the others had been in flight.
    assert sum(map(sum, (batch.num_rows_R for batch in whole))) == 17
    assert pipeline.scheduler.num_restored_tokens == len(PROMPT) + 2
    assert pipeline.scheduler.num_failovers == 1
    assert pipeline.scheduler.num_preemptions == 0


def test_what_the_new_replica_has_by_then_is_not_restored() -> None:
    """Of two with a common beginning the second finds what is restored for the first."""
    pipeline = ExactPipeline(1, 2)
    for n in range(2):
        pipeline.ask([*PROMPT, n], max_tokens=20)
    for _ in range(3):
        pipeline.turn()
    pipeline.kill(used_in(pipeline, 1))
    (batch,) = restoring(pipeline)
    num_found = len(PROMPT) // 4 * 4
    assert sorted(batch.first_positions_R) == [0, num_found]
    pipeline.finish()
    assert pipeline.answers() == [True, True]


def test_penalties_go_on_counting_on_another_last_stage() -> None:
    pipeline = generating(1, 2, repetition_penalty=1.3)
    pipeline.kill(used_in(pipeline, 1))
    pipeline.finish()
    assert pipeline.answers() == [True]


def test_a_prompt_goes_on_from_what_has_landed_of_it() -> None:
    pipeline = ExactPipeline(1, 2, max_rows=16)
    pipeline.ask(PROMPT * 4, max_tokens=3)
    first = pipeline.batches[0].micro_batch_id
    while pipeline.batches[-1].micro_batch_id < first + 4:
        pipeline.turn()
    pipeline.kill(used_in(pipeline, 1))
    assert 0 < pipeline.scheduler.num_restored_tokens < len(PROMPT * 4)
    pipeline.finish()
    assert pipeline.answers() == [True]


# --- without a path


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sequences_wait_for_a_replica_and_keep_what_the_others_have(stage: int) -> None:
    pipeline = generating(1, 1, 1)
    pipeline.kill(used_in(pipeline, stage))
    pipeline.ask(PROMPT, max_tokens=4)
    pipeline.finish()
    assert (pipeline.scheduler.num_running, pipeline.scheduler.num_waiting) == (0, 2)
    assert not pipeline.scheduler.is_ready
    pipeline.open(stage)
    pipeline.finish()
    assert pipeline.answers() == [True, True]
    assert pipeline.scheduler.num_restored_tokens == len(PROMPT) + 2
    assert pipeline.scheduler.num_preemptions == 0


def down(*, lost_limit_s: float) -> ExactPipeline:
    """A pipeline with a lost stage, one request that generates and one that waits."""
    pipeline = ExactPipeline(1, 1, settings=SchedulerSettings(lost_limit_s=lost_limit_s))
    pipeline.ask(PROMPT, max_tokens=20)
    for _ in range(9):
        pipeline.turn()
    pipeline.kill(pipeline.of_stage(1)[0])
    pipeline.ask(PROMPT, max_tokens=4)
    return pipeline


def test_without_a_path_for_too_long_all_end_with_unavailable() -> None:
    pipeline = down(lost_limit_s=5.0)
    pipeline.now_s += 4.9
    pipeline.handle(Tick())
    assert len(pipeline.open_requests) == 2
    pipeline.now_s += 0.2
    pipeline.handle(Tick())
    pipeline.ask(PROMPT)
    for asked in pipeline.asked.values():
        (error,) = asked.ends
        assert isinstance(error, Unavailable)
        assert error.retry_after_s is not None
    pipeline.finish()
    assert pipeline.scheduler.kv_blocks_used(pipeline.of_stage(0)[0]) == 0


def test_requests_are_taken_again_once_a_path_is_there() -> None:
    pipeline = down(lost_limit_s=0.0)
    pipeline.now_s += 1.0
    pipeline.handle(Tick())
    pipeline.open(1)
    request_id = pipeline.ask(PROMPT)
    pipeline.finish()
    assert pipeline.asked[request_id].ends == [FinishReason.LENGTH]


def test_what_only_fitted_a_replica_that_is_gone_is_not_kept_for_ever() -> None:
    pipeline = ExactPipeline(1, num_stages=2, settings=SchedulerSettings(lost_limit_s=5.0))
    pipeline.open(1, num_kv_blocks=6)
    big = pipeline.open(1, num_kv_blocks=60)
    pipeline.ask(PROMPT, max_tokens=20)
    for _ in range(9):
        pipeline.turn()
    pipeline.kill(big)
    small = pipeline.ask([1, 2, 3])
    pipeline.finish()
    assert pipeline.asked[small].ends == [FinishReason.LENGTH]
    for _ in range(2):
        assert pipeline.asked[0].is_open
        pipeline.now_s += 5.5
        pipeline.handle(Tick())
    assert isinstance(pipeline.asked[0].ends[0], Unavailable)


def test_a_lane_that_is_too_small_for_a_request_leaves_it_to_the_other() -> None:
    pipeline = ExactPipeline(1, num_stages=2)
    for num_kv_blocks in (8, 60):
        pipeline.open(1, num_kv_blocks=num_kv_blocks)
    for number in range(4):
        pipeline.ask([number] * 20, max_tokens=20)
    pipeline.finish()
    assert pipeline.answers() == [True] * 4


def test_before_the_first_path_stands_requests_are_refused() -> None:
    pipeline = ExactPipeline(1, num_stages=2)
    pipeline.ask(PROMPT)
    assert isinstance(pipeline.asked[0].ends[0], Unavailable)


def test_deadlines_and_cancellation_reach_those_who_wait_for_a_path() -> None:
    pipeline = ExactPipeline(1, 1)
    pipeline.ask(PROMPT, max_tokens=20, deadline_s=9.0)
    pipeline.ask(PROMPT, max_tokens=20)
    for _ in range(9):
        pipeline.turn()
    pipeline.kill(pipeline.of_stage(1)[0])
    pipeline.handle(RequestCancelled(request_id=1))
    pipeline.now_s = 10.0
    pipeline.handle(Tick())
    assert isinstance(pipeline.asked[0].ends[0], DeadlineExceeded)
    assert pipeline.asked[1].ends == [FinishReason.CANCELLED]
    pipeline.finish()
    (first,) = pipeline.replicas
    assert first.engine.sequences == {}
    assert pipeline.scheduler.kv_blocks_used(first.id) == 0


def test_a_request_that_is_cancelled_while_it_is_restored_leaves_nothing_behind() -> None:
    pipeline = generating(1, 2)
    pipeline.kill(used_in(pipeline, 1))
    pipeline.handle(RequestCancelled(request_id=0))
    pipeline.finish()
    for replica in pipeline.replicas:
        assert replica.engine.sequences == {}
        assert pipeline.scheduler.kv_blocks_used(replica.id) == 0
    assert pipeline.scheduler.num_in_flight == 0


# --- links


def test_over_a_new_link_sequences_go_on_and_nothing_is_restored() -> None:
    pipeline = generating(1, 1)
    upstream_id, downstream_id = pipeline.batches[-1].path
    lost = pipeline.batches[-1].micro_batch_id
    pipeline.cut(upstream_id, downstream_id)
    abandoned = [a for a in pipeline.actions if isinstance(a, AbandonMicroBatches)]
    assert [a.replica_id for a in abandoned] == [upstream_id, downstream_id]
    assert all(a.micro_batch_ids == [lost] for a in abandoned)
    pipeline.connect(upstream_id, downstream_id)
    pipeline.finish()
    assert pipeline.answers() == [True]
    assert pipeline.scheduler.num_restored_tokens == 0


def test_where_a_link_is_lost_another_replica_may_stand_in() -> None:
    pipeline = generating(1, 2)
    pipeline.cut(*pipeline.batches[-1].path)
    pipeline.finish()
    assert pipeline.answers() == [True]
    assert pipeline.scheduler.num_restored_tokens == len(PROMPT) + 2
