"""What the real models compute: equal over all splits, and close to transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from core.sampling.parameters import SamplingParameters
from core.tokens.tokenizer import ChatMessage
from tests.numerics.conftest import RealModel, TransformersModel

PROMPTS = Path(__file__).parents[1] / "data" / "mt_bench_question.jsonl"
WINDOW = 1024

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


def agreement(left_TV: npt.NDArray[np.float32], right_TV: npt.NDArray[np.float32]) -> float:
    """Share of rows with the same likeliest token."""
    return float((left_TV.argmax(axis=1) == right_TV.argmax(axis=1)).mean())


def negative_log_likelihood(
    logits_TV: npt.NDArray[np.float32], token_ids_T: npt.NDArray[np.int32]
) -> float:
    """Sum over the window's tokens but the first, in nats, computed in float64."""
    total = 0.0
    for row, target in zip(logits_TV[:-1], token_ids_T[1:], strict=True):
        shifted = row.astype(np.float64) - row.max()
        total += float(np.log(np.exp(shifted).sum()) - shifted[target])
    return total


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["smollm2", "stories15m"])
def test_logits_are_bit_equal_over_all_splits(
    name: str, number_format: str, request: pytest.FixtureRequest
) -> None:
    model: RealModel = request.getfixturevalue(name)
    text = "The penstock leads the water of the lake down to the turbine. " * 12
    token_ids = model.tokenizer.encode(text)[:160]
    unsplit = model.chain(number_format=number_format).logits(token_ids, chunk=160)
    assert np.isfinite(unsplit).all()
    for num_stages, chunk in ((2, 64), (3, 160), (5, 7)):
        chain = model.chain(number_format=number_format, num_stages=num_stages)
        np.testing.assert_array_equal(chain.logits(token_ids, chunk=chunk), unsplit)


@pytest.mark.parametrize(("number_format", "least_agreement"), [("fp32", 0.999), ("bf16", 0.99)])
def test_smollm2_agrees_with_transformers(
    number_format: str,
    least_agreement: float,
    smollm2: RealModel,
    smollm2_reference: TransformersModel,
    wikitext_ids: npt.NDArray[np.int32],
) -> None:
    token_ids = wikitext_ids[:WINDOW].tolist()
    expected = smollm2_reference.logits(token_ids)
    actual = smollm2.chain(number_format=number_format).logits(token_ids)
    if number_format == "fp32":
        assert np.abs(actual - expected).max() < 1e-3
    assert agreement(actual, expected) >= least_agreement


def test_perplexity_of_bf16_is_within_half_a_percent_of_transformers_fp32(
    smollm2: RealModel,
    smollm2_reference: TransformersModel,
    wikitext_ids: npt.NDArray[np.int32],
) -> None:
    chain = smollm2.chain(number_format="bf16")
    expected = actual = 0.0
    num_windows = 32
    for window in range(num_windows):
        token_ids = wikitext_ids[window * WINDOW : (window + 1) * WINDOW]
        expected += negative_log_likelihood(smollm2_reference.logits(token_ids.tolist()), token_ids)
        actual += negative_log_likelihood(chain.logits(token_ids.tolist()), token_ids)
    num_targets = num_windows * (WINDOW - 1)
    assert np.exp(actual / num_targets) == pytest.approx(np.exp(expected / num_targets), rel=0.005)


def test_greedy_text_is_the_same_over_all_splits_alone_and_in_a_batch(
    smollm2: RealModel,
) -> None:
    prompts = []
    for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:20]:
        turn = json.loads(line)["turns"][0]
        prompts.append(smollm2.tokenizer.encode_chat([ChatMessage(role="user", content=turn)]))
    greedy = SamplingParameters(max_tokens=64, temperature=0.0, ignore_eos=True)
    seeded = SamplingParameters(max_tokens=64, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)

    alone = smollm2.chain(number_format="bf16")
    expected = [alone.generate([prompt], [greedy])[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    for num_stages, chunk in ((1, 50), (2, 256), (3, 33), (5, 500)):
        chain = smollm2.chain(number_format="bf16", num_stages=num_stages)
        for first in (0, 10):  # 10 prompts of ours among 6 of others
            ours = prompts[first : first + 10]
            others = prompts[10 - first : 16 - first]
            outputs = chain.generate(
                others[:3] + ours + others[3:],
                [seeded] * 3 + [greedy] * 10 + [seeded] * 3,
                chunk=chunk,
            )
            assert outputs[3:13] == expected[first : first + 10]
