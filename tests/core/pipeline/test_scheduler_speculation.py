"""What the scheduler does with guesses, event by event."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import DeadlineExceeded
from core.pipeline.actions import (
    Action,
    DropReplica,
    EmitTokens,
    FinishReason,
    Refuse,
    RunMicroBatch,
)
from core.pipeline.batch import PositionLogprobs
from core.pipeline.batch_time import Coefficients
from core.pipeline.cut import Part
from core.pipeline.events import (
    Event,
    LinkReady,
    PipelineFacts,
    PipelineKnown,
    ReplicaFacts,
    ReplicaReady,
    RequestArrived,
    RequestCancelled,
    Tick,
    TokensSampled,
)
from core.pipeline.policy import PolicySettings
from core.pipeline.scheduler import Scheduler
from core.pipeline.settings import SchedulerSettings
from core.pipeline.speculation import SpeculationSettings
from core.pipeline.waiting import WaitingQueue
from core.sampling.parameters import SamplingParameters

PROMPT = [1, 2, 3, 4, 5, 6, 7, 1, 2]
# After the first token, 3, the prompt's own continuation is guessed.
DRAFT = [4, 5, 6, 7]


class Line:
    """A scheduler, and the events that its pipeline answers with."""

    def __init__(
        self,
        *,
        num_kv_blocks: int = 100,
        max_draft_tokens: int = 4,
        overlap_gain: float = 0.05,
    ) -> None:
        free_rows = PolicySettings(
            prior=Coefficients(1e-2, 1e-7, 0.0), contention_prior=1.0, overlap_gain=overlap_gain
        )
        self.scheduler = Scheduler(
            SchedulerSettings(
                policy=free_rows,
                speculation=SpeculationSettings(max_draft_tokens=max_draft_tokens),
            )
        )
        self.now_s = 0.0
        facts = PipelineFacts(
            num_layers=2,
            num_slots=4,
            context_length=1000,
            kv_block_size=4,
            eos_token_ids=(0,),
        )
        self.handle(PipelineKnown(facts=facts))
        for layer in (0, 1):
            part = Part(layer, ("",))
            of_replica = ReplicaFacts(num_kv_blocks=num_kv_blocks, max_rows=64, part=part)
            self.handle(ReplicaReady(replica_id=layer, facts=of_replica))
        self.handle(LinkReady(upstream_id=0, downstream_id=1))

    @property
    def queue(self) -> WaitingQueue:
        assert self.scheduler._pipeline is not None
        return self.scheduler._pipeline.admission.queue

    @property
    def blocks_used(self) -> list[int]:
        return [self.scheduler.kv_blocks_used(replica_id) for replica_id in (0, 1)]

    def handle(self, event: Event) -> list[Action]:
        self.now_s += 0.001
        return self.scheduler.handle(event, self.now_s)

    def arrive(
        self,
        request_id: int = 1,
        prompt: list[int] = PROMPT,
        *,
        deadline_s: float | None = None,
        **fields: Any,
    ) -> RunMicroBatch:
        sampling = SamplingParameters(**({"max_tokens": 50} | fields))
        event = RequestArrived(
            request_id=request_id, token_ids=prompt, sampling=sampling, deadline_s=deadline_s
        )
        return only_batch(self.handle(event))

    def sample(self, batch: RunMicroBatch, token_ids: list[int], **fields: Any) -> list[Action]:
        event = TokensSampled(micro_batch_id=batch.micro_batch_id, token_ids=token_ids, **fields)
        return self.handle(event)

    def guessing(self, **fields: Any) -> RunMicroBatch:
        """The micro-batch with a request's first guesses."""
        return only_batch(self.sample(self.arrive(**fields), [3]))


def only_batch(actions: list[Action]) -> RunMicroBatch:
    (batch,) = (action for action in actions if isinstance(action, RunMicroBatch))
    return batch


def only_news(actions: list[Action]) -> EmitTokens:
    (news,) = (action for action in actions if isinstance(action, EmitTokens))
    return news


def test_guesses_are_further_rows_of_the_run() -> None:
    batch = Line().guessing()
    assert batch.token_ids_T == [3, *DRAFT]
    assert (batch.first_positions_R, batch.num_rows_R, batch.num_samples_R) == ([9], [5], [5])


@pytest.mark.parametrize(
    ("sampled", "taken"),
    [
        ([4, 5, 6, 7, 8], [4, 5, 6, 7, 8]),
        ([4, 5, 9, 7, 8], [4, 5, 9]),
        ([9, 5, 6, 7, 8], [9]),
    ],
    ids=["all", "some", "none"],
)
def test_tokens_count_up_to_the_one_after_the_last_right_guess(
    sampled: list[int], taken: list[int]
) -> None:
    line = Line()
    actions = line.sample(line.guessing(), sampled)
    assert only_news(actions).token_ids == taken
    following = only_batch(actions)
    assert following.first_positions_R == [9 + len(taken)]
    assert following.token_ids_T[0] == taken[-1]
    speculation = line.scheduler.speculation
    assert speculation.num_accepted == len(taken) - 1
    assert line.scheduler.num_tokens == 1 + len(taken)


def test_tokens_beyond_the_end_of_sequence_are_neither_shown_nor_billed() -> None:
    line = Line()
    batch = line.guessing(prompt=[1, 2, 3, 4, 0, 6, 7, 1, 2])
    assert batch.token_ids_T == [3, 4, 0, 6, 7]
    news = only_news(line.sample(batch, [4, 0, 6, 7, 8]))
    assert news.token_ids == [4, 0]
    assert news.finish_reason is FinishReason.STOP
    assert news.usage is not None
    assert news.usage.completion_tokens == 3
    assert line.blocks_used == [0, 0]


def test_a_stop_token_among_the_guesses_ends_the_answer() -> None:
    line = Line()
    news = only_news(line.sample(line.guessing(stop_token_ids=(5,)), [4, 5, 6, 7, 8]))
    assert (news.token_ids, news.finish_reason) == ([4, 5], FinishReason.STOP)


def test_no_more_is_guessed_than_may_be_generated() -> None:
    line = Line()
    batch = line.guessing(max_tokens=4)
    assert batch.num_rows_R == [3]
    news = only_news(line.sample(batch, [4, 5, 6]))
    assert (news.token_ids, news.finish_reason) == ([4, 5, 6], FinishReason.LENGTH)


def test_log_probabilities_come_with_the_tokens_that_count() -> None:
    line = Line()
    entries = [
        PositionLogprobs(token_id=token, logprob=-1.0, top_token_ids=(), top_logprobs=())
        for token in (4, 5, 9, 7, 8)
    ]
    batch = line.guessing(logprobs=0)
    news = only_news(line.sample(batch, [4, 5, 9, 7, 8], logprobs=entries))
    assert news.logprobs == entries[:3]


def test_a_cancelled_request_takes_nothing_from_its_guesses() -> None:
    line = Line()
    batch = line.guessing()
    line.handle(RequestCancelled(request_id=1))
    actions = line.sample(batch, [4, 5, 6, 7, 8])
    assert not any(isinstance(action, EmitTokens | RunMicroBatch) for action in actions)
    assert line.blocks_used == [0, 0]


def test_the_deadline_passes_while_guesses_are_verified() -> None:
    line = Line()
    batch = line.guessing(deadline_s=1.0)
    line.now_s = 2.0
    (refusal,) = (action for action in line.handle(Tick()) if isinstance(action, Refuse))
    assert isinstance(refusal.error, DeadlineExceeded)
    actions = line.sample(batch, [4, 5, 6, 7, 8])
    assert not any(isinstance(action, EmitTokens | RunMicroBatch) for action in actions)


def test_a_preempted_sequence_keeps_the_tokens_that_its_guesses_bring() -> None:
    """The older of two needs the younger's blocks while the younger's guesses are in flight."""
    line = Line(num_kv_blocks=6, overlap_gain=-0.5)  # decodes go in two micro-batches
    older = line.arrive(1, [50], max_tokens=14)
    younger = line.arrive(2, PROMPT, max_tokens=14)
    older = only_batch(line.sample(older, [60]))
    younger = only_batch(line.sample(younger, [3]))
    known = [*PROMPT, 3]
    for turn in range(61, 70):
        actions = line.sample(older, [turn])
        true = [token % 7 + 1 for token in younger.token_ids_T]
        known += true
        if line.scheduler.num_preemptions:
            break
        older = only_batch(actions)
        younger = only_batch(line.sample(younger, true))
    assert len(true) > 1
    assert only_news(line.sample(younger, true)).token_ids == true
    assert line.queue.num_rows == len(known)


def test_tokens_that_are_too_few_drop_the_replica_that_sent_them() -> None:
    line = Line()
    actions = line.sample(line.guessing(), [4])
    assert any(isinstance(action, DropReplica) for action in actions)


def test_guesses_take_no_block_that_a_running_sequence_may_need() -> None:
    line = Line(num_kv_blocks=15)
    prefill = line.arrive()  # three blocks, and 15 positions at most are generated
    batch = only_batch(line.sample(prefill, [3]))
    assert batch.num_rows_R == [5]
    scarce = Line(num_kv_blocks=4)
    prefill = scarce.arrive(max_tokens=7)
    batch = only_batch(scarce.sample(prefill, [3]))
    assert batch.num_rows_R == [3]  # positions 9, 10 and 11 fill the third block


def test_nothing_is_guessed_while_prompts_wait() -> None:
    line = Line()
    prefill = line.arrive()
    long_prompt = list(range(100, 300))
    sampling = SamplingParameters(max_tokens=5)
    arrival = RequestArrived(request_id=2, token_ids=long_prompt, sampling=sampling)
    first = [a for a in line.handle(arrival) if isinstance(a, RunMicroBatch)]
    assert first, "the first chunk of the long prompt is on its way"
    batches = [a for a in line.sample(prefill, [3]) if isinstance(a, RunMicroBatch)]
    decodes = [batch for batch in batches if batch.token_ids_T[0] == 3]
    assert [batch.num_rows_R[0] for batch in decodes] == [1]


def test_speculation_can_be_switched_off() -> None:
    assert Line(max_draft_tokens=0).guessing().token_ids_T == [3]
