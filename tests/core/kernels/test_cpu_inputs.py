"""Inputs of int8 and int4 products against numpy, to the bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.activation.cpu import silu_multiply_panel
from core.kernels.activation.reference import silu_multiply
from core.kernels.arithmetic import GROUP, Arithmetic
from core.kernels.inputs import quantise_rows
from core.kernels.linear.reference import linear, quantise, quantised_linear, spread
from core.kernels.norm.cpu import norm_rows
from core.kernels.norm.reference import rms_norm
from tests.support.arithmetics import (
    inputs_to_floats,
    integer_arithmetics,
    nibble_arithmetics,
    rounded,
    to_inputs,
)

each_arithmetic = pytest.mark.parametrize(
    "arithmetic",
    integer_arithmetics() + integer_arithmetics(largest_input=64) + nibble_arithmetics(),
    ids=lambda a: a.name,
)


def quantised(arithmetic: Arithmetic, rows_TK: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """What the kernel makes of rows that the arithmetic beside int8 has computed."""
    source = to_inputs(arithmetic.unquantised, rows_TK)
    num_groups = rows_TK.size // GROUP
    out = np.full(num_groups * arithmetic.input_group_bytes // 4, 0xFFFFFFFF, np.uint32)
    quantise_rows(arithmetic, source.ctypes.data, len(rows_TK), rows_TK.shape[1], out.ctypes.data)
    return out


@each_arithmetic
def test_rows_are_quantised_as_by_the_reference(arithmetic: Arithmetic) -> None:
    rows_TK = np.random.default_rng(0).standard_normal((7, 192)).astype(np.float32)
    rows_TK[1] *= 1e20
    rows_TK[2] *= 1e-20
    rows_TK[3, :64] = 0
    rows_TK[4, 5] = 1e9  # all others of its group round to zero
    rows_TK = rounded(rows_TK, "bf16")
    expected = to_inputs(arithmetic, rows_TK).reshape(-1)
    np.testing.assert_array_equal(quantised(arithmetic, rows_TK), expected)


@each_arithmetic
def test_vanishing_groups_become_zero_and_a_nan_stays_visible(arithmetic: Arithmetic) -> None:
    rows_TK = np.full((2, 64), 1e-38, np.float32)
    rows_TK[1, 17] = np.nan
    zeros, nans = quantised(arithmetic, rows_TK).reshape(2, -1)
    assert not inputs_to_floats(arithmetic, zeros).any()
    assert np.isnan(nans[-2].view(np.float32))


@each_arithmetic
def test_norm_and_gated_silu_are_quantised_to_half_a_step(
    arithmetic: Arithmetic,
) -> None:
    random = np.random.default_rng(1)
    hidden_TG = random.standard_normal((3, 128)).astype(np.float32)
    weight_G = random.standard_normal(128).astype(np.float32)
    normed = np.zeros(6 * arithmetic.input_group_bytes // 4, np.uint32)
    norm_rows(arithmetic, hidden_TG, 3, 128, weight_G, 1e-5, False, normed.ctypes.data)
    gate_up = (random.standard_normal((3, 2, 64)) * 20).astype(np.float32)
    gated = np.zeros((3, arithmetic.input_group_bytes // 4), np.uint32)
    silu_multiply_panel(arithmetic, gate_up.ctypes.data, 3, gated.ctypes.data, gated.strides[0])

    for words, expected in (
        (normed, rms_norm(hidden_TG, weight_G, eps=1e-5)),
        (gated, silu_multiply(gate_up[:, 0], gate_up[:, 1])),
    ):
        groups = expected.reshape(-1, GROUP)
        error = np.abs(inputs_to_floats(arithmetic, words) - groups)
        rounded_groups = groups if arithmetic.has_nibbles else spread(groups, group=GROUP)
        largest = np.abs(rounded_groups).max(axis=1, keepdims=True)
        assert (error <= largest / (2 * arithmetic.largest_input - 1)).all()


def test_a_great_input_costs_the_others_of_its_group_less_when_it_is_spread() -> None:
    random = np.random.default_rng(2)
    weight_NK = random.standard_normal((200, 64)).astype(np.float32)
    rows_TK = random.standard_normal((50, 64)).astype(np.float32)
    rows_TK[:, 9] *= 60  # as channels of real models are
    exact = linear(rows_TK, weight_NK)
    integers, scales = quantise(rows_TK, group=GROUP)
    unspread = linear(integers * scales, weight_NK)
    no_bias = np.zeros(200, np.float32)
    spread_too = quantised_linear(rows_TK, weight_NK, no_bias, group=GROUP)
    assert np.square(spread_too - exact).mean() < 0.5 * np.square(unspread - exact).mean()
