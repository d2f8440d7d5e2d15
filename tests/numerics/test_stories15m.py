"""stories15M, the smallest trained model, against transformers: 4 windows of its 256 positions.

The text is stories of its own, sampled: on text of another kind its distributions are so flat
that rounding the weights to bf16 alone changes 2 % of the likeliest tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.sampling.parameters import SamplingParameters
from tests.numerics.conftest import RealModel
from tests.support.transformers_models import transformers_model

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


def stories(model: RealModel) -> list[list[int]]:
    """Four stories of 256 tokens, sampled in fp32."""
    prompt = model.tokenizer.encode("Once upon a time")
    sampling = [
        SamplingParameters(max_tokens=256 - len(prompt), seed=seed, ignore_eos=True)
        for seed in range(4)
    ]
    outputs = model.chain(number_format="fp32").generate([prompt] * 4, sampling)
    return [prompt + output for output in outputs]


@pytest.mark.parametrize(("number_format", "least_agreement"), [("fp32", 0.999), ("bf16", 0.99)])
def test_stories15m_agrees_with_transformers(
    number_format: str, least_agreement: float, stories15m: RealModel
) -> None:
    windows = stories(stories15m)
    reference = transformers_model(stories15m.checkpoint, stories15m.config)
    with torch.inference_mode():
        expected = np.concatenate([reference(torch.tensor([w])).logits[0].numpy() for w in windows])
    chain = stories15m.chain(number_format=number_format, num_stages=2)
    actual = np.concatenate([chain.logits(window) for window in windows])
    if number_format == "fp32":
        assert np.abs(actual - expected).max() < 1e-3
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).mean() >= least_agreement
