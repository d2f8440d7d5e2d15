"""What the real models compute: equal over all splits, and close to transformers'."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from core.sampling.parameters import SamplingParameters
from core.tokens.tokenizer import ChatMessage
from tests.numerics import reference_likelihoods
from tests.numerics.conftest import WINDOW, RealModel, log_likelihood
from tests.support.likelihood import log_likelihoods

PROMPTS = Path(__file__).parents[1] / "data" / "mt_bench_question.jsonl"
# Kernels hold no GIL: independent chains run beside each other.
NUM_CORES = 2

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]


def agreement(left_TV: npt.NDArray[np.float32], right_TV: npt.NDArray[np.float32]) -> float:
    """Share of rows with the same likeliest token."""
    return float((left_TV.argmax(axis=1) == right_TV.argmax(axis=1)).mean())


@pytest.mark.parametrize(
    ("name", "number_format"),
    [(name, kind) for name in ("smollm2", "stories15m") for kind in ("fp32", "bf16", "int8")]
    + [("smollm2", "int4")],
)
def test_logits_are_bit_equal_over_all_splits(
    name: str, number_format: str, request: pytest.FixtureRequest
) -> None:
    model: RealModel = request.getfixturevalue(name)
    text = "The penstock leads the water of the lake down to the turbine. " * 12
    token_ids = model.tokenizer.encode(text)[:160]

    def logits(num_stages: int, chunk: int) -> npt.NDArray[np.float32]:
        chain = model.chain(number_format=number_format, num_stages=num_stages)
        return chain.logits(token_ids, chunk=chunk)

    with ThreadPoolExecutor(NUM_CORES) as pool:
        unsplit, *splits = pool.map(logits, (1, 2, 3, 5), (160, 64, 160, 7))
    assert np.isfinite(unsplit).all()
    for split in splits:
        np.testing.assert_array_equal(split, unsplit)


@pytest.mark.parametrize(
    ("number_format", "least_agreement"),
    [("fp32", 0.999), ("bf16", 0.99), ("int8", 0.95), ("int4", 0.95)],
)
def test_smollm2_agrees_with_transformers(
    number_format: str,
    least_agreement: float,
    smollm2: RealModel,
    wikitext_ids: npt.NDArray[np.int32],
    first_window_TV: npt.NDArray[np.float32],
) -> None:
    actual = smollm2.chain(number_format=number_format).logits(wikitext_ids[:WINDOW].tolist())
    if number_format == "fp32":
        assert np.abs(actual - first_window_TV).max() < 1e-3
    assert agreement(actual, first_window_TV) >= least_agreement


@pytest.fixture(scope="module")
def perplexities(smollm2: RealModel, wikitext_ids: npt.NDArray[np.int32]) -> dict[str, float]:
    """On 32 windows, of transformers in fp32 as recorded, and of ours in each format."""
    recorded = reference_likelihoods.read()
    windows_WT = wikitext_ids[: len(recorded.sums) * WINDOW].reshape(-1, WINDOW)

    def perplexity(sums: list[float]) -> float:
        return float(np.exp(-sum(sums) / (windows_WT.size - len(windows_WT))))

    def ours(number_format: str) -> float:
        chain = smollm2.chain(number_format=number_format)
        return perplexity([log_likelihood(chain, token_ids_T) for token_ids_T in windows_WT])

    formats = ("bf16", "int8", "int4")
    with ThreadPoolExecutor(NUM_CORES) as pool:
        measured = dict(zip(formats, pool.map(ours, formats), strict=True))
    return {"transformers": perplexity(recorded.sums)} | measured


def test_the_recorded_likelihood_is_what_transformers_computes(
    first_window_TV: npt.NDArray[np.float32], wikitext_ids: npt.NDArray[np.int32]
) -> None:
    computed = log_likelihoods([first_window_TV], wikitext_ids[:WINDOW]).sum()
    assert reference_likelihoods.read().sums[0] == pytest.approx(computed, rel=1e-5)


def test_perplexity_of_bf16_is_within_half_a_percent_of_transformers_fp32(
    perplexities: dict[str, float],
) -> None:
    assert perplexities["bf16"] == pytest.approx(perplexities["transformers"], rel=0.005)


@pytest.mark.parametrize("number_format", ["int8", "int4"])
def test_perplexity_of_integers_is_within_one_percent_of_bf16(
    number_format: str, perplexities: dict[str, float]
) -> None:
    assert perplexities[number_format] == pytest.approx(perplexities["bf16"], rel=0.01)


def test_greedy_text_is_the_same_over_all_splits_alone_and_in_a_batch(
    smollm2: RealModel,
) -> None:
    prompts = []
    for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:20]:
        turn = json.loads(line)["turns"][0]
        prompts.append(smollm2.tokenizer.encode_chat([ChatMessage(role="user", content=turn)]))
    greedy = SamplingParameters(max_tokens=64, temperature=0.0, ignore_eos=True)
    seeded = SamplingParameters(max_tokens=64, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)

    def generate_alone() -> list[list[int]]:
        chain = smollm2.chain(number_format="bf16")
        return [chain.generate([prompt], [greedy])[0] for prompt in prompts]

    def generate_together(num_stages: int, chunk: int) -> list[list[int]]:
        chain = smollm2.chain(number_format="bf16", num_stages=num_stages)
        outputs = []
        for first in (0, 10):  # 10 prompts of ours among 6 of others
            ours = prompts[first : first + 10]
            others = prompts[10 - first : 16 - first]
            outputs += chain.generate(
                others[:3] + ours + others[3:],
                [seeded] * 3 + [greedy] * 10 + [seeded] * 3,
                chunk=chunk,
            )[3:13]
        return outputs

    with ThreadPoolExecutor(NUM_CORES) as pool:
        alone = pool.submit(generate_alone)
        together = pool.map(generate_together, (1, 2, 3, 5), (50, 256, 33, 500))
    expected = alone.result()
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    for outputs in together:
        assert outputs == expected
