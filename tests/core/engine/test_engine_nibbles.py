"""int4: matrices of 4 bits as the file has them, beside others in int8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from core.kernels.arithmetic import Arithmetic
from core.models.llama.packing import StageLayout
from core.models.llama.weight_names import LayerReader
from tests.core.engine.conftest import NIBBLE_MODELS, OpenModel

OpenOne = Callable[[str], OpenModel]
TOKEN_IDS = [int(token) for token in np.random.default_rng(3).integers(0, 263, 60)]


def nibbles(model: OpenModel, layer: int) -> list[bool]:
    """Which matrices of a layer are packed with 4 bits: q/k/v, output, gate/up, down."""
    layout = StageLayout(model.config, Arithmetic("int4", "portable"))
    return layout.nibbles_of_layer(LayerReader(model.checkpoint, model.config, layer))


@pytest.mark.parametrize("name", NIBBLE_MODELS)
def test_logits_are_near_those_of_the_same_weights_in_fp32(name: str, open_model: OpenOne) -> None:
    model = open_model(name)
    exact, actual = (
        model.chain(num_stages=1, number_format=number_format).logits(TOKEN_IDS)
        for number_format in ("fp32", "int4")
    )
    assert np.abs(actual - exact).mean() < 0.03 * np.abs(exact).mean() + 0.02
    assert np.mean(actual.argmax(axis=1) == exact.argmax(axis=1)) > 0.8


def test_a_matrix_has_4_bits_where_all_its_parts_have_them(open_model: OpenOne) -> None:
    model = open_model("llama-mixed")
    assert nibbles(model, 0) == [True, True, True, True]
    assert nibbles(model, 1) == [True, True, True, False]
    assert nibbles(model, 2) == [False, True, True, True]
    assert nibbles(model, 3) == [True, True, False, True]


def test_inputs_of_padded_heads_have_8_bits(open_model: OpenOne) -> None:
    assert nibbles(open_model("qwen2-padded-nibbles"), 0) == [True, False, True, True]


def test_without_weights_of_4_bits_int4_is_int8_but_for_a_bit_of_the_inputs(
    open_model: OpenOne,
) -> None:
    model = open_model("mistral")
    exact, int8, int4 = (
        model.chain(num_stages=2, number_format=number_format).logits(TOKEN_IDS)
        for number_format in ("fp32", "int8", "int4")
    )
    errors = [np.abs(logits - exact).mean() for logits in (int8, int4)]
    assert errors[0] < errors[1] < 3 * errors[0]
