"""What is shared, what is computed again, and what nobody else may see: as lists of events."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest

from core.pipeline.actions import EmitTokens, FlushUpdates, RunMicroBatch, Usage
from core.pipeline.batch_time import Coefficients
from core.pipeline.events import (
    Event,
    PipelineFacts,
    PipelineLost,
    PipelineReady,
    RequestArrived,
    RequestCancelled,
    StageFacts,
    TokensSampled,
)
from core.pipeline.scheduler import Scheduler, SchedulerSettings
from core.pipeline.simulate import SimulatedRequest, SimulationSettings, simulate
from core.sampling.parameters import SamplingParameters
from tests.support.fake_engine import FakeEngine, completion

BLOCK_SIZE, MAX_ROWS = 4, 64
PROMPT = list(range(100, 118))  # four full blocks and two tokens


class Pipeline:
    """A scheduler and stages that compute at once; results wait until they are delivered."""

    def __init__(self, *num_blocks: int, shares_prefixes: bool = True) -> None:
        self.scheduler = Scheduler(SchedulerSettings(shares_prefixes=shares_prefixes))
        self.num_blocks = num_blocks or (64, 64)
        self.outputs: dict[int, list[int]] = {}
        self.usage: dict[int, Usage] = {}
        self.rows: list[int] = []
        self._prompts: dict[int, list[int]] = {}
        self._results: deque[TokensSampled] = deque()
        self._now_s = 0.0
        self.open()

    def open(self) -> None:
        self._results.clear()
        self._engines = [
            FakeEngine(num_kv_blocks=count, is_last=True, block_size=BLOCK_SIZE)
            for count in self.num_blocks
        ]
        stages = tuple(
            StageFacts(num_kv_blocks=count, max_rows=MAX_ROWS) for count in self.num_blocks
        )
        facts = PipelineFacts(
            stages=stages, num_slots=8, context_length=256, kv_block_size=BLOCK_SIZE
        )
        self.handle(PipelineReady(facts=facts))

    def ask(self, prompt: list[int], *, max_tokens: int = 1, salt: str = "") -> RequestArrived:
        """The event of a new request."""
        request_id = len(self._prompts)
        self._prompts[request_id], self.outputs[request_id] = prompt, []
        return RequestArrived(
            request_id=request_id,
            token_ids=prompt,
            sampling=SamplingParameters(max_tokens=max_tokens),
            cache_salt=salt,
        )

    def answer(self, prompt: list[int], *, max_tokens: int = 1, salt: str = "") -> Usage:
        """Serves one request to its end."""
        event = self.ask(prompt, max_tokens=max_tokens, salt=salt)
        self.handle(event)
        self.finish()
        return self.usage[event.request_id]

    def finish(self) -> None:
        """Delivers results until nothing is in flight; every answer must be right."""
        while self._results:
            self.step()
        for request_id, output in self.outputs.items():
            assert output == completion(self._prompts[request_id], len(output))

    def step(self) -> None:
        self.handle(self._results.popleft())

    def handle(self, *events: Event) -> None:
        self._now_s += 0.01
        for action in self.scheduler.handle_all(events, self._now_s):
            match action:
                case RunMicroBatch():
                    self._run(action)
                case FlushUpdates():
                    for engine, updates in zip(self._engines, action.updates_S, strict=True):
                        engine.apply(updates)
                case EmitTokens():
                    self.outputs[action.request_id] += action.token_ids
                    if action.usage is not None:
                        self.usage[action.request_id] = action.usage

    def _run(self, action: RunMicroBatch) -> None:
        self.rows.append(len(action.token_ids_T))
        for engine, updates in zip(self._engines, action.updates_S, strict=True):
            engine.apply(updates)
            sampled = engine.run(
                action.slots_R,
                action.first_positions_R,
                action.num_rows_R,
                action.num_samples_R,
                action.token_ids_T,
            )
        result = TokensSampled(micro_batch_id=action.micro_batch_id, token_ids=sampled)
        self._results.append(result)


def test_of_a_prompt_seen_before_only_the_rest_behind_full_blocks_is_computed() -> None:
    pipeline = Pipeline()
    assert pipeline.answer(PROMPT).cached_tokens == 0
    assert pipeline.answer(PROMPT).cached_tokens == 16
    assert pipeline.rows == [18, 2]
    assert pipeline.scheduler.num_prompt_tokens == 36
    assert pipeline.scheduler.num_cached_tokens == 16


def test_of_a_prompt_of_full_blocks_the_last_one_is_computed_again() -> None:
    pipeline = Pipeline()
    pipeline.answer(PROMPT[:16])
    assert pipeline.answer(PROMPT[:16]).cached_tokens == 12
    assert pipeline.rows == [16, 4]


def test_prompts_share_as_far_as_they_are_equal() -> None:
    pipeline = Pipeline()
    pipeline.answer(PROMPT)
    assert pipeline.answer(PROMPT[:11] + [7] * 20).cached_tokens == 8
    assert pipeline.answer(PROMPT + PROMPT).cached_tokens == 16
    assert pipeline.answer([7, *PROMPT]).cached_tokens == 0


def test_another_salt_finds_nothing_and_leaves_nothing_to_be_found() -> None:
    pipeline = Pipeline()
    pipeline.answer(PROMPT, salt="one")
    assert pipeline.answer(PROMPT, salt="two").cached_tokens == 0
    assert pipeline.answer(PROMPT).cached_tokens == 0
    assert pipeline.answer(PROMPT, salt="one").cached_tokens == 16


def test_requests_that_arrive_together_share_within_one_micro_batch() -> None:
    pipeline = Pipeline()
    pipeline.handle(*(pipeline.ask([*PROMPT, last]) for last in (1, 2, 3)))
    assert pipeline.rows == [19 + 3 + 3]
    pipeline.finish()
    assert [usage.cached_tokens for usage in pipeline.usage.values()] == [0, 16, 16]


def test_what_was_generated_begins_the_next_prompt_of_a_conversation() -> None:
    pipeline = Pipeline()
    pipeline.answer(PROMPT, max_tokens=11)
    # The last token of the 29 was never computed.
    said = PROMPT + pipeline.outputs[0]
    assert pipeline.answer([*said, 1, 2, 3]).cached_tokens == 28


def test_a_prompt_in_flight_is_shared_even_when_its_request_is_cancelled() -> None:
    pipeline = Pipeline()
    pipeline.handle(pipeline.ask(PROMPT))
    pipeline.handle(RequestCancelled(request_id=0))
    assert pipeline.answer(PROMPT).cached_tokens == 16


def test_free_blocks_without_content_go_first_and_then_the_oldest_content() -> None:
    old, new = PROMPT, [token + 50 for token in PROMPT]
    pipeline = Pipeline(12, 12)
    pipeline.answer(old)
    pipeline.answer(new)
    assert pipeline.answer([7] * 16).cached_tokens == 0  # takes the four others
    assert pipeline.answer([8] * 12).cached_tokens == 0  # and the last three of `old`
    assert pipeline.answer(old[:8]).cached_tokens == 4  # and the last one of `new`
    assert pipeline.answer(new).cached_tokens == 12


def test_a_prefix_is_shared_as_far_as_all_stages_have_it() -> None:
    pipeline = Pipeline(8, 64)
    pipeline.answer(PROMPT)
    pipeline.answer([7] * 24)
    assert pipeline.scheduler._path is not None
    scarce, ample = pipeline.scheduler._path.mirror.allocators
    assert (scarce.num_used, ample.num_used) == (0, 0)
    assert pipeline.answer(PROMPT).cached_tokens == 8
    assert pipeline.answer(PROMPT).cached_tokens == 16


def test_shared_blocks_count_once_when_requests_are_admitted() -> None:
    """Three prompts of six blocks, five of them common, fit nine blocks together."""
    pipeline = Pipeline(9, 9)
    prompts = [[*range(20), last] for last in (1, 2, 3)]
    pipeline.handle(*(pipeline.ask(prompt, max_tokens=2) for prompt in prompts))
    assert pipeline.scheduler.num_running == 3
    assert pipeline.scheduler.kv_blocks_used_S == [8, 8]
    pipeline.finish()
    assert len(pipeline.usage) == 3
    assert pipeline.scheduler.kv_blocks_used_S == [0, 0]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    pipeline = Pipeline(10, 10)
    pipeline.handle(*(pipeline.ask([token] * 14, max_tokens=20) for token in (1, 2)))
    while not pipeline.scheduler.num_preemptions:
        pipeline.step()
    assert pipeline.rows[-1] == 1  # the older one took a fifth block of the younger one's
    before = len(pipeline.rows)
    pipeline.handle(RequestCancelled(request_id=0))
    assert pipeline.rows[before:] == [21 - 16]
    pipeline.finish()
    assert len(pipeline.outputs[1]) == 20
    assert pipeline.usage[1].cached_tokens == 0


def test_a_lost_pipeline_takes_its_blocks_with_it() -> None:
    pipeline = Pipeline()
    pipeline.answer(PROMPT)
    pipeline.handle(PipelineLost(reason="a stage died"))
    pipeline.open()
    assert pipeline.answer(PROMPT).cached_tokens == 0


def test_nothing_is_shared_where_that_is_turned_off() -> None:
    pipeline = Pipeline(shares_prefixes=False)
    assert [pipeline.answer(PROMPT).cached_tokens for _ in range(2)] == [0, 0]
    assert pipeline.rows == [18, 18]


def test_a_simulated_load_with_one_long_beginning_gets_its_first_tokens_sooner() -> None:
    beginning = list(range(1000))
    stages = (Coefficients(2e-3, 1.8e-4, 1e-7),) * 2
    same = [
        SimulatedRequest(
            arrival_s=0.3 * n, num_prompt=1010, num_output=4, token_ids=beginning + [n] * 10
        )
        for n in range(10)
    ]
    distinct = [replace(request, token_ids=()) for request in same]
    settings = SimulationSettings(stages=stages)
    shared, alone = simulate(same, settings), simulate(distinct, settings)
    assert shared.cached_share == pytest.approx(9 * 992 / 10100)
    assert alone.cached_share == 0.0
    first_s = shared.time_to_first_token_s[0]
    assert first_s == alone.time_to_first_token_s[0]
    assert max(shared.time_to_first_token_s[1:]) < 0.2 * first_s
