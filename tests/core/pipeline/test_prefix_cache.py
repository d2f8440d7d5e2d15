"""What is shared, what is computed again, and what nobody else may see: as lists of events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.pipeline.actions import Usage
from core.pipeline.batch_time import Coefficients
from core.pipeline.events import RequestCancelled
from core.pipeline.settings import SchedulerSettings
from core.pipeline.simulate import SimulatedRequest, SimulationSettings, simulate
from tests.support.exact_pipeline import ExactPipeline

PROMPT = list(range(100, 118))  # four full blocks and two tokens


class Pipeline(ExactPipeline):
    """Two stages that compute at once; results wait until they are delivered."""

    def __init__(self, *num_blocks: int, shares_prefixes: bool = True) -> None:
        self._num_blocks = num_blocks or (64, 64)
        settings = SchedulerSettings(shares_prefixes=shares_prefixes)
        super().__init__(settings=settings, num_stages=2)
        for stage, count in enumerate(self._num_blocks):
            self.open(stage, num_kv_blocks=count)

    @property
    def rows(self) -> list[int]:
        return [len(batch.token_ids_T) for batch in self.batches]

    @property
    def blocks_used(self) -> list[int]:
        return [self.scheduler.kv_blocks_used(replica.id) for replica in self.replicas]

    def answer(self, prompt: list[int], *, max_tokens: int = 1, salt: str = "") -> Usage:
        """Serves one request to its end."""
        request_id = self.ask(prompt, max_tokens=max_tokens, cache_salt=salt)
        self.finish()
        usage = self.asked[request_id].usage
        assert usage is not None
        return usage


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
    pipeline.handle(*(pipeline.request([*PROMPT, last]) for last in (1, 2, 3)))
    assert pipeline.rows == [19 + 3 + 3]
    pipeline.finish()
    assert [asked.usage.cached_tokens for asked in pipeline.asked.values() if asked.usage] == [
        0,
        16,
        16,
    ]


def test_what_was_generated_begins_the_next_prompt_of_a_conversation() -> None:
    pipeline = Pipeline()
    pipeline.answer(PROMPT, max_tokens=11)
    # The last token of the 29 was never computed.
    said = PROMPT + pipeline.asked[0].output
    assert pipeline.answer([*said, 1, 2, 3]).cached_tokens == 28


def test_a_prompt_in_flight_is_shared_even_when_its_request_is_cancelled() -> None:
    pipeline = Pipeline()
    pipeline.ask(PROMPT)
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
    assert pipeline.blocks_used == [0, 0]
    assert pipeline.answer(PROMPT).cached_tokens == 8
    assert pipeline.answer(PROMPT).cached_tokens == 16


def test_shared_blocks_count_once_when_requests_are_admitted() -> None:
    """Three prompts of six blocks, five of them common, fit nine blocks together."""
    pipeline = Pipeline(9, 9)
    prompts = [[*range(20), last] for last in (1, 2, 3)]
    pipeline.handle(*(pipeline.request(prompt, max_tokens=2) for prompt in prompts))
    assert pipeline.scheduler.num_running == 3
    assert pipeline.blocks_used == [8, 8]
    pipeline.finish()
    assert all(pipeline.answers())
    assert pipeline.blocks_used == [0, 0]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    pipeline = Pipeline(10, 10)
    pipeline.handle(*(pipeline.request([token] * 14, max_tokens=20) for token in (1, 2)))
    while not pipeline.scheduler.num_preemptions:
        pipeline.turn()
    assert pipeline.rows[-1] == 1  # the older one took a fifth block of the younger one's
    before = len(pipeline.rows)
    pipeline.handle(RequestCancelled(request_id=0))
    assert pipeline.rows[before:] == [21 - 16]
    pipeline.finish()
    assert len(pipeline.asked[1].output) == 20
    assert pipeline.asked[1].usage is not None
    assert pipeline.asked[1].usage.cached_tokens == 0


def test_lost_replicas_take_their_blocks_with_them() -> None:
    pipeline = Pipeline()
    pipeline.answer(PROMPT)
    for replica in pipeline.replicas:
        pipeline.kill(replica.id)
        pipeline.open_part(replica.part)
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
