"""Guessed tokens that are verified as further rows of a run, and forgotten where wrong."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from core.pipeline.batch import PositionLogprobs
from core.sampling.parameters import SamplingParameters
from tests.core.engine.conftest import OpenModel
from tests.support.chain import Chain, Run

OpenOne = Callable[[str], OpenModel]
NUM_TOKENS = 40
PROMPTS = [[5, 9, 200, 31], [7] * 19, list(range(40, 73))]
GREEDY = SamplingParameters(max_tokens=NUM_TOKENS, temperature=0.0)
DRAWN = SamplingParameters(max_tokens=NUM_TOKENS, temperature=1.2, top_p=0.9, seed=77)


def generate_guessing(
    chain: Chain, sampling: list[SamplingParameters], expected: list[list[int]], seed: int
) -> list[list[int]]:
    """Generates as the scheduler does, guessing from `expected`, rightly or wrongly."""
    rng = random.Random(seed)
    for slot, parameters in enumerate(sampling):
        chain.start(slot, parameters)
    outputs = [[chain.step([Run(slot, prompt)])[0]] for slot, prompt in enumerate(PROMPTS)]
    while any(len(output) < NUM_TOKENS for output in outputs):
        runs, drafts = [], {}
        for slot, output in enumerate(outputs):
            if len(output) < NUM_TOKENS:
                draft = expected[slot][len(output) : len(output) + rng.randrange(6)]
                drafts[slot] = [rng.choice([token, token, token, 3]) for token in draft]
                rows = [output[-1], *drafts[slot]]
                first = len(PROMPTS[slot]) + len(output) - 1
                runs.append(Run(slot, rows, num_samples=len(rows), first=first))
        tokens = iter(chain.step(runs))
        for slot, draft in drafts.items():
            sampled = [next(tokens) for _ in range(len(draft) + 1)]
            outputs[slot] += sampled[: 1 + num_right(draft, sampled)]
    for slot in range(len(PROMPTS)):
        chain.end(slot)
    return [output[:NUM_TOKENS] for output in outputs]


def num_right(draft: list[int], sampled: list[int]) -> int:
    pairs = zip(draft, sampled, strict=False)
    return next((at for at, (guess, token) in enumerate(pairs) if guess != token), len(draft))


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("number_format", ["fp32", "bf16", "int8"])
def test_verified_tokens_are_those_that_come_one_at_a_time(
    number_format: str, num_stages: int, open_model: OpenOne
) -> None:
    model = open_model("mistral")
    sampling = [GREEDY, DRAWN, DRAWN]
    wire = "bf16" if number_format == "bf16" else "f32"
    unsplit = model.chain(num_stages=1, number_format=number_format, wire=wire)
    expected = unsplit.generate(PROMPTS, sampling)
    chain = model.chain(num_stages=num_stages, number_format=number_format, wire=wire)
    for seed in range(3):
        assert generate_guessing(chain, sampling, expected, seed) == expected


def test_log_probabilities_of_verified_tokens_are_those_of_single_rows(
    open_model: OpenOne,
) -> None:
    chain = open_model("llama-odd-sizes").chain(num_stages=1)
    asking = SamplingParameters(max_tokens=9, temperature=0.0, logprobs=1)
    expected = chain.generate([PROMPTS[0]], [asking])[0]

    def logprobs(rows: list[int], count: int) -> list[PositionLogprobs | None]:
        chain.start(0, asking)
        batch = chain._micro_batch([Run(0, rows, num_samples=count)])
        sampled = chain.engines[0].step(batch, None).sampled
        chain.end(0)
        assert sampled is not None
        return list(sampled.logprobs)

    rows = [*PROMPTS[0], *expected[:4]]
    singly = [logprobs(rows[:end], 1)[0] for end in range(len(PROMPTS[0]), len(rows) + 1)]
    assert logprobs(rows, 5) == singly
    assert [entry.token_id for entry in singly if entry] == expected[:5]


def test_right_guesses_are_worth_several_steps(open_model: OpenOne) -> None:
    chain = open_model("mistral").chain(num_stages=2)
    expected = np.array(chain.generate([PROMPTS[0]], [GREEDY])[0])
    chain.start(0, GREEDY)
    rows = [*PROMPTS[0], *expected[:-1].tolist()]
    sampled = chain.step([Run(0, rows, num_samples=NUM_TOKENS)])
    chain.end(0)
    np.testing.assert_array_equal(sampled, expected)
