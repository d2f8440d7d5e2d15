"""What a last stage answers is not believed: results that are no numbers, tokens that are none."""

from __future__ import annotations

import pytest

from core.errors import NotFinite
from core.pipeline.actions import Action, DropReplica, EmitTokens, Refuse, RunMicroBatch
from core.pipeline.batch import NO_TOKEN, PositionLogprobs
from core.pipeline.cut import Part
from core.pipeline.events import (
    PipelineFacts,
    PipelineKnown,
    ReplicaFacts,
    ReplicaReady,
    RequestArrived,
    TokensSampled,
)
from core.pipeline.scheduler import Scheduler, SchedulerSettings
from core.sampling.parameters import SamplingParameters

VOCAB_SIZE = 100
LOGPROB = PositionLogprobs(token_id=1, logprob=-1.0)


def two_requests() -> tuple[Scheduler, RunMicroBatch]:
    """A pipeline of one stage, and the micro-batch with the prompts of the requests 0 and 1."""
    scheduler = Scheduler(SchedulerSettings())
    facts = PipelineFacts(num_layers=1, num_slots=4, context_length=64, vocab_size=VOCAB_SIZE)
    scheduler.handle(PipelineKnown(facts=facts), 0.0)
    replica = ReplicaFacts(num_kv_blocks=16, max_rows=64, part=Part(0, ("",)))
    scheduler.handle(ReplicaReady(replica_id=7, facts=replica), 0.1)
    sampling = SamplingParameters(max_tokens=9)
    arrivals = [
        RequestArrived(request_id=id, token_ids=[1, 2, 3], sampling=sampling) for id in (0, 1)
    ]
    (batch,) = [
        action
        for action in scheduler.handle_all(arrivals, 0.2)
        if isinstance(action, RunMicroBatch)
    ]
    assert sum(batch.num_samples_R) == 2
    return scheduler, batch


def answer(scheduler: Scheduler, batch: RunMicroBatch, *token_ids: int) -> list[Action]:
    event = TokensSampled(micro_batch_id=batch.micro_batch_id, token_ids=token_ids)
    return scheduler.handle(event, 0.3)


def test_a_request_whose_result_is_not_finite_ends_with_an_error_and_the_others_go_on() -> None:
    scheduler, batch = two_requests()
    actions = answer(scheduler, batch, NO_TOKEN, 5)
    (refusal,) = [action for action in actions if isinstance(action, Refuse)]
    assert refusal.request_id == 0
    assert isinstance(refusal.error, NotFinite)
    assert refusal.usage is not None
    (news,) = [action for action in actions if isinstance(action, EmitTokens)]
    assert (news.request_id, news.token_ids) == (1, [5])
    (following,) = [action for action in actions if isinstance(action, RunMicroBatch)]
    assert following.token_ids_T == [5]


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 1 << 31, NO_TOKEN - 1])
def test_a_stage_that_answers_with_a_token_beyond_the_vocabulary_is_dropped(token_id: int) -> None:
    scheduler, batch = two_requests()
    actions = answer(scheduler, batch, 5, token_id)
    (dropped,) = [action for action in actions if isinstance(action, DropReplica)]
    assert dropped.replica_id == 7
    assert "vocabulary" in dropped.reason
    assert not any(isinstance(action, EmitTokens) for action in actions)


def test_a_stage_that_answers_with_fewer_log_probabilities_than_tokens_is_dropped() -> None:
    scheduler, batch = two_requests()
    event = TokensSampled(micro_batch_id=batch.micro_batch_id, token_ids=[5, 6], logprobs=[LOGPROB])
    assert any(isinstance(action, DropReplica) for action in scheduler.handle(event, 0.3))
