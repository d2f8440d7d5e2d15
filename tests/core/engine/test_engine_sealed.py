"""A sealed model computes what the plain one computes, to the bit, in every number format."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from core.models.registry import load_config
from core.weights.sealed.opening import open_sealed
from tests.core.engine.conftest import OpenModel
from tests.support.chain import Chain
from tests.support.sealed_models import SealedModel, seal_for_stages

TOKEN_IDS = [int(token) for token in np.random.default_rng(3).integers(0, 263, 40)]


@pytest.fixture(scope="module")
def model(open_model: Callable[[str], OpenModel]) -> OpenModel:
    return open_model("llama-mixed")  # with weights of 4 bits, and others


@pytest.fixture(scope="module")
def sealed(model: OpenModel, tmp_path_factory: pytest.TempPathFactory) -> SealedModel:
    return seal_for_stages(model.folder, tmp_path_factory.mktemp("sealed"))


@pytest.mark.parametrize("number_format", ["fp32", "bf16", "int8", "int4"])
def test_sealed_and_plain_give_equal_logits(
    number_format: str, model: OpenModel, sealed: SealedModel
) -> None:
    checkpoint = open_sealed(sealed.folder, sealed.owner_keys)
    chain = Chain(
        checkpoint,
        load_config(checkpoint),
        num_stages=2,
        number_format=number_format,
        num_kv_blocks=16,
    )
    plain = model.chain(num_stages=2, number_format=number_format).logits(TOKEN_IDS)
    np.testing.assert_array_equal(chain.logits(TOKEN_IDS), plain)
