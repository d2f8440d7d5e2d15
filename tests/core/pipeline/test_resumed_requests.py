"""Requests that another coordinator had begun: prompt and output so far."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import InvalidInput
from core.pipeline.actions import EmitTokens, FinishReason
from core.pipeline.cut import Part
from core.pipeline.events import (
    LinkReady,
    PipelineFacts,
    PipelineKnown,
    ReplicaFacts,
    ReplicaReady,
    RequestArrived,
)
from core.pipeline.scheduler import Scheduler
from core.sampling.parameters import SamplingParameters
from tests.support.exact_pipeline import ExactPipeline
from tests.support.fake_engine import completion

PROMPT = list(range(100, 122))


@pytest.mark.parametrize("penalties", [{}, {"presence_penalty": 0.5}])
def test_the_rest_is_generated_and_the_whole_is_counted(penalties: dict[str, Any]) -> None:
    """That usage counts all and no token comes twice is checked by the pipeline."""
    pipeline = ExactPipeline(1, 2)
    before = completion(PROMPT, 5)
    pipeline.ask(PROMPT + before, num_output_tokens=5, max_tokens=12, **penalties)
    pipeline.finish()
    assert pipeline.answers() == [True]
    assert pipeline.asked[0].output == completion(PROMPT, 12)[5:]


def resumed(tokens: list[int], num_output: int, **fields: Any) -> Any:
    """What comes of such a request in a context of 32 positions at once."""
    scheduler = Scheduler()
    facts = PipelineFacts(num_layers=2, num_slots=4, context_length=32, eos_token_ids=(7,))
    of_layer = [
        ReplicaFacts(num_kv_blocks=9, max_rows=64, part=Part(layer, ("",))) for layer in (0, 1)
    ]
    sampling = SamplingParameters(**({"max_tokens": 10} | fields))
    *_, action = scheduler.handle_all(
        (
            PipelineKnown(facts=facts),
            ReplicaReady(replica_id=1, facts=of_layer[0]),
            ReplicaReady(replica_id=2, facts=of_layer[1]),
            LinkReady(upstream_id=1, downstream_id=2),
            RequestArrived(
                request_id=1, token_ids=tokens, num_output_tokens=num_output, sampling=sampling
            ),
        ),
        0.0,
    )
    return action


@pytest.mark.parametrize(("last", "reason"), [(3, FinishReason.LENGTH), (7, FinishReason.STOP)])
def test_one_that_had_its_last_token_ends_at_once(last: int, reason: FinishReason) -> None:
    action = resumed([1] * 20 + [2] * 9 + [last], 10)
    assert isinstance(action, EmitTokens)
    assert (action.token_ids, action.finish_reason) == ([], reason)
    assert action.usage is not None
    assert (action.usage.prompt_tokens, action.usage.completion_tokens) == (20, 10)


def test_output_counts_once_against_the_context() -> None:
    assert not hasattr(resumed([1] * 22 + [2] * 9, 9), "error")
    assert isinstance(resumed([1] * 23 + [2] * 9, 9).error, InvalidInput)


@pytest.mark.parametrize("num_output", [5, 6, -1])
def test_output_without_a_prompt_is_refused(num_output: int) -> None:
    assert isinstance(resumed([1] * 5, num_output).error, InvalidInput)
