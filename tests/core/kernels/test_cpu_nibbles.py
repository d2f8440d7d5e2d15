"""Products of weights of 4 bits on the CPU against the numpy reference, and their promises."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.ahead import AHEAD_SIZE
from core.kernels.arithmetic import GROUP, NIBBLE_GROUP, Arithmetic
from core.kernels.linear.cpu import PanelScratch, greedy_tokens, multiply_columns
from core.kernels.linear.nibble_panels import pack_nibble_panels
from core.kernels.linear.reference import NibbleMatrix, nibble_linear
from core.kernels.memory import aligned_zeros
from tests.support.arithmetics import nibble_arithmetics, to_inputs

each_arithmetic = pytest.mark.parametrize("arithmetic", nibble_arithmetics(), ids=lambda a: a.name)
FloatArray = npt.NDArray[np.float32]
NO_SCRATCH = PanelScratch(np.zeros(0, np.float32), np.zeros(AHEAD_SIZE, np.int64))


def random_nibbles(num_columns: int, num_inputs: int) -> NibbleMatrix:
    random = np.random.default_rng(num_columns * 1000 + num_inputs)
    shape = (num_columns, num_inputs // NIBBLE_GROUP)
    scales_NG = (0.01 + 0.3 * random.random(shape)).astype(np.float16)
    return NibbleMatrix(
        random.integers(0, 16, (num_columns, num_inputs), dtype=np.uint8),
        scales_NG,
        (-7.5 * scales_NG * random.random(shape)).astype(np.float16),
    )


class PackedNibbles:
    """A matrix as the kernels read it, in every other panel where `step` is 2."""

    def __init__(self, arithmetic: Arithmetic, weight: NibbleMatrix, *, step: int = 1) -> None:
        num_columns, num_inputs = weight.integers_NK.shape
        self.arithmetic, self.weight = arithmetic, weight
        self.padded_inputs = -(-num_inputs // GROUP) * GROUP
        self.num_panels = -(-num_columns // 64) * step
        random = np.random.default_rng(num_inputs)
        self.bias = random.standard_normal(self.num_panels * 64).astype(np.float32)
        num_bytes = self.num_panels * arithmetic.panel_bytes(self.padded_inputs)
        self.panels = aligned_zeros((num_bytes // 4,), np.uint32)
        pack_nibble_panels(*weight, self.padded_inputs, self.panels, first=step - 1, step=step)

    def inputs(self, x_TK: FloatArray) -> npt.NDArray[np.uint32]:
        padding = [(0, 0), (0, self.padded_inputs - x_TK.shape[1])]
        return to_inputs(self.arithmetic, np.pad(x_TK, padding))

    def expected(self, x_TK: FloatArray) -> FloatArray:
        """By the reference, from whole groups of inputs."""
        missing = self.padded_inputs - x_TK.shape[1]
        groups = [(0, 0), (0, missing // NIBBLE_GROUP)]
        weight = NibbleMatrix(
            np.pad(self.weight.integers_NK, [(0, 0), (0, missing)]),
            np.pad(self.weight.scales_NG, groups),
            np.pad(self.weight.minima_NG, groups),
        )
        bias_N = self.bias[: len(weight.integers_NK)]
        return nibble_linear(np.pad(x_TK, [(0, 0), (0, missing)]), weight, bias_N, group=GROUP)

    def multiply(self, x_TK: FloatArray, out_TN: FloatArray | None = None) -> FloatArray:
        """The product; added to `out_TN` where given."""
        inputs, accumulates = self.inputs(x_TK), int(out_TN is not None)
        if out_TN is None:
            out_TN = np.full((len(x_TK), len(self.bias)), np.nan, np.float32)
        multiply_columns(
            self.arithmetic, inputs.ctypes.data, inputs.strides[0], len(x_TK),
            self.panels.ctypes.data, self.padded_inputs, 0, len(self.bias), self.bias.ctypes.data,
            out_TN.ctypes.data, out_TN.strides[0], accumulates, NO_SCRATCH,
        )  # fmt: skip
        return out_TN


def random_rows(num_rows: int, size: int) -> FloatArray:
    return np.random.default_rng(num_rows).standard_normal((num_rows, size)).astype(np.float32)


@each_arithmetic
@pytest.mark.parametrize(("num_columns", "num_inputs"), [(64, 64), (200, 96), (7, 32), (129, 320)])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 6, 11, 64])
def test_a_product_matches_the_reference(
    arithmetic: Arithmetic, num_columns: int, num_inputs: int, num_rows: int
) -> None:
    matrix = PackedNibbles(arithmetic, random_nibbles(num_columns, num_inputs))
    x_TK = random_rows(num_rows, num_inputs)
    out_TN = matrix.multiply(x_TK)
    expected = matrix.expected(x_TK)
    np.testing.assert_allclose(out_TN[:, :num_columns], expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(
        out_TN[:, num_columns:], np.tile(matrix.bias[num_columns:], (num_rows, 1))
    )


@each_arithmetic
def test_weights_of_quantised_rows_are_the_products_of_unit_vectors(arithmetic: Arithmetic) -> None:
    weight = random_nibbles(64, 64)
    matrix = PackedNibbles(arithmetic, weight)
    matrix.bias[:] = 0
    scales, minima = (
        np.repeat(part.astype(np.float32), NIBBLE_GROUP, axis=1)
        for part in (weight.scales_NG, weight.minima_NG)
    )
    expected = (scales * weight.integers_NK + minima).T
    np.testing.assert_allclose(
        matrix.multiply(np.eye(64, dtype=np.float32)), expected, rtol=1e-6, atol=1e-6
    )


@each_arithmetic
def test_a_product_is_added_to_the_residual_stream(arithmetic: Arithmetic) -> None:
    matrix = PackedNibbles(arithmetic, random_nibbles(64, 64))
    x_TK, residual = random_rows(9, 64), random_rows(9, 64)
    added = matrix.multiply(x_TK, residual.copy())
    np.testing.assert_allclose(added, matrix.multiply(x_TK) + residual, rtol=4e-6, atol=4e-6)


@each_arithmetic
def test_panels_of_two_matrices_alternate(arithmetic: Arithmetic) -> None:
    weight = random_nibbles(128, 64)
    alone, every_other = (PackedNibbles(arithmetic, weight, step=step) for step in (1, 2))
    alone.bias[:] = every_other.bias[:] = 0
    x_TK = random_rows(3, 64)
    panels = every_other.multiply(x_TK).reshape(3, 4, 64)
    np.testing.assert_array_equal(panels[:, 1::2].reshape(3, 128), alone.multiply(x_TK))
    assert not panels[:, ::2].any()


@each_arithmetic
def test_a_row_has_the_same_product_whatever_the_number_of_rows(arithmetic: Arithmetic) -> None:
    matrix = PackedNibbles(arithmetic, random_nibbles(128, 192))
    x_TK = random_rows(70, 192)
    together = matrix.multiply(x_TK)
    for count in (*range(1, 18), 64, 70):
        np.testing.assert_array_equal(matrix.multiply(x_TK[:count]), together[:count])


@each_arithmetic
def test_the_largest_integers_do_not_saturate(arithmetic: Arithmetic) -> None:
    integers_NK = np.full((64, 64), 15, np.uint8)
    scales_NG, minima_NG = np.ones((64, 2), np.float16), np.zeros((64, 2), np.float16)
    matrix = PackedNibbles(arithmetic, NibbleMatrix(integers_NK, scales_NG, minima_NG))
    matrix.bias[:] = 0
    for sign in (-1, 1):
        out_TN = matrix.multiply(np.full((2, 64), sign, np.float32))
        np.testing.assert_allclose(out_TN, sign * 15 * 64.0, rtol=1e-6)


@each_arithmetic
def test_greedy_tokens_are_the_arg_max_of_the_logits(arithmetic: Arithmetic) -> None:
    matrix = PackedNibbles(arithmetic, random_nibbles(320, 64))
    x_TK = random_rows(9, 64)
    inputs, tokens = matrix.inputs(x_TK), np.full(9, -1, np.int32)
    greedy_tokens(
        arithmetic, inputs.ctypes.data, inputs.strides[0], 9, matrix.panels.ctypes.data,
        matrix.padded_inputs, matrix.num_panels, matrix.bias.ctypes.data,
        np.full((9, 64), np.nan, np.float32), tokens, np.zeros(9, np.float32), NO_SCRATCH,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, matrix.multiply(x_TK).argmax(axis=1))


def test_all_kinds_of_instructions_compute_the_same_bits() -> None:
    weight, x_TK = random_nibbles(129, 320), random_rows(9, 320)
    first, *others = (
        PackedNibbles(arithmetic, weight).multiply(x_TK) for arithmetic in nibble_arithmetics()
    )
    for other in others:
        np.testing.assert_array_equal(other, first)
