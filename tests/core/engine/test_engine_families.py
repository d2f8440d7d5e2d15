"""Every family against transformers, over all splits, in every arithmetic of this host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.arithmetic import Arithmetic
from tests.core.engine.conftest import MODELS, OpenModel
from tests.support.arithmetics import host_arithmetics, integer_arithmetics

NUM_TOKENS = 90  # more than the windows and than a context that scaling starts from
OpenOne = Callable[[str], OpenModel]


def token_ids(model: OpenModel) -> list[int]:
    random = np.random.default_rng(11)
    return [int(token) for token in random.integers(0, model.config.vocab_size, NUM_TOKENS)]


@functools.cache
def reference_logits(folder: Path, ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "arithmetic", host_arithmetics() + integer_arithmetics(), ids=lambda a: a.name
)
def test_logits_agree_with_transformers(
    name: str, arithmetic: Arithmetic, open_model: OpenOne
) -> None:
    model = open_model(name)
    ids = token_ids(model)
    expected = reference_logits(model.folder, tuple(ids))
    chain = model.chain(num_stages=1, number_format=arithmetic.number_format, arithmetic=arithmetic)
    actual = chain.logits(ids)
    assert actual.dtype == np.float32
    difference = np.abs(actual - expected)
    if arithmetic.number_format == "fp32":
        assert difference.max() < 1e-4
    else:
        assert difference.mean() < 0.03 * np.abs(expected).mean() + 0.02
        assert np.mean(actual.argmax(axis=1) == expected.argmax(axis=1)) > 0.8


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("number_format", ["fp32", "bf16", "int8"])
def test_every_split_computes_the_same_bits(
    name: str, number_format: str, open_model: OpenOne
) -> None:
    model = open_model(name)
    ids = token_ids(model)
    unsplit = model.chain(num_stages=1, number_format=number_format).logits(ids)
    for num_stages in range(2, model.config.num_layers + 1):
        chain = model.chain(num_stages=num_stages, number_format=number_format)
        np.testing.assert_array_equal(chain.logits(ids, chunk=17), unsplit)
