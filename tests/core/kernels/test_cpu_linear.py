"""Packed products on the CPU against the numpy reference, and their promise to rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.ahead import AHEAD_SIZE
from core.kernels.arithmetic import GROUP, Arithmetic
from core.kernels.linear.cpu import (
    LEAST_ROWS_TO_WIDEN_ONCE,
    PanelScratch,
    cut_into_tiles,
    greedy_tokens,
    multiply_columns,
    pack_panels,
)
from core.kernels.linear.reference import linear, quantised_linear
from core.kernels.memory import aligned_zeros
from tests.support.arithmetics import host_arithmetics, integer_arithmetics, rounded, to_inputs

each_arithmetic = pytest.mark.parametrize(
    "arithmetic",
    host_arithmetics() + integer_arithmetics() + integer_arithmetics(largest_input=64),
    ids=lambda a: a.name,
)
FloatArray = npt.NDArray[np.float32]
NOT_AHEAD = np.zeros(AHEAD_SIZE, np.int64)
SCRATCH = PanelScratch(aligned_zeros((64 * 4096,), np.float32), NOT_AHEAD)


class PackedMatrix:
    """A random [N, K] matrix as the kernels read it."""

    def __init__(self, arithmetic: Arithmetic, num_columns: int, num_inputs: int) -> None:
        random = np.random.default_rng(num_columns * 1000 + num_inputs)
        weight_NK = random.standard_normal((num_columns, num_inputs)).astype(np.float32)
        self.arithmetic = arithmetic
        self.weight_NK = rounded(weight_NK, arithmetic.number_format)
        self.bias = random.standard_normal(-(-num_columns // 64) * 64).astype(np.float32)
        self.padded_inputs = -(-num_inputs // 64) * 64
        num_bytes = len(self.bias) // 64 * arithmetic.panel_bytes(self.padded_inputs)
        self.panels = aligned_zeros((num_bytes // 4,), np.uint32)
        scratch = np.full(self.padded_inputs, np.nan, np.float32)
        pack_panels(arithmetic, weight_NK, self.padded_inputs, self.panels, 0, 64, scratch)

    def expected(self, x_TK: FloatArray) -> FloatArray:
        """The product by the reference."""
        bias_N = self.bias[: len(self.weight_NK)]
        if not self.arithmetic.is_integer:
            return linear(x_TK, self.weight_NK, bias_N)
        padding = [(0, 0), (0, self.padded_inputs - x_TK.shape[1])]
        x_TK, weight_NK = np.pad(x_TK, padding), np.pad(self.weight_NK, padding)
        largest = self.arithmetic.largest_input
        return quantised_linear(x_TK, weight_NK, bias_N, group=GROUP, largest_input=largest)

    def inputs(self, x_TK: FloatArray) -> npt.NDArray[np.uint32]:
        """Rows in the input format."""
        padded = np.zeros((len(x_TK), self.padded_inputs), np.float32)
        padded[:, : x_TK.shape[1]] = x_TK
        return to_inputs(self.arithmetic, padded)

    def multiply(
        self,
        x_TK: FloatArray,
        out_TN: FloatArray,
        *,
        columns: tuple[int, int] | None = None,
        accumulates: bool = False,
        scratch: PanelScratch = SCRATCH,
    ) -> FloatArray:
        inputs = self.inputs(x_TK)
        columns = columns or (0, len(self.bias))
        multiply_columns(
            self.arithmetic, inputs.ctypes.data, inputs.strides[0], len(x_TK),
            self.panels.ctypes.data, self.padded_inputs, *columns,
            self.bias.ctypes.data, out_TN.ctypes.data, out_TN.strides[0], int(accumulates),
            scratch,
        )  # fmt: skip
        return out_TN


def random_rows(arithmetic: Arithmetic, num_rows: int, size: int) -> FloatArray:
    rows = np.random.default_rng(num_rows).standard_normal((num_rows, size)).astype(np.float32)
    return rounded(rows, arithmetic.number_format)


@each_arithmetic
@pytest.mark.parametrize(("num_columns", "num_inputs"), [(64, 64), (200, 100), (7, 3), (129, 321)])
@pytest.mark.parametrize("num_rows", [1, 5, 6, 7, 13, 14, 130])
def test_a_product_matches_the_reference(
    arithmetic: Arithmetic, num_columns: int, num_inputs: int, num_rows: int
) -> None:
    matrix = PackedMatrix(arithmetic, num_columns, num_inputs)
    x_TK = random_rows(arithmetic, num_rows, num_inputs)
    out_TN = np.full((num_rows, len(matrix.bias)), np.nan, np.float32)
    expected = matrix.expected(x_TK)

    matrix.multiply(x_TK, out_TN)

    np.testing.assert_allclose(out_TN[:, :num_columns], expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(
        out_TN[:, num_columns:], np.tile(matrix.bias[num_columns:], (num_rows, 1))
    )


@each_arithmetic
def test_a_product_is_added_to_the_residual_stream(arithmetic: Arithmetic) -> None:
    matrix = PackedMatrix(arithmetic, 64, 64)
    x_TK = random_rows(arithmetic, 9, 64)
    alone = matrix.multiply(x_TK, np.full((9, 64), np.nan, np.float32))
    residual = np.random.default_rng(3).standard_normal((9, 64)).astype(np.float32)
    added = matrix.multiply(x_TK, residual.copy(), accumulates=True)
    if arithmetic.is_integer:  # the scaled sums of the groups are added to it one by one
        np.testing.assert_allclose(added, alone + residual, rtol=2e-6, atol=2e-6)
    else:
        np.testing.assert_array_equal(added, alone + residual)


@each_arithmetic
def test_a_row_has_the_same_product_whatever_the_number_of_rows(arithmetic: Arithmetic) -> None:
    matrix = PackedMatrix(arithmetic, 128, 200)
    many = LEAST_ROWS_TO_WIDEN_ONCE + 5
    x_TK = random_rows(arithmetic, many, 200)
    together = matrix.multiply(x_TK, np.full((many, 128), np.nan, np.float32))
    for count in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 16, 64, many):
        part = np.full((count, 128), np.nan, np.float32)
        np.testing.assert_array_equal(matrix.multiply(x_TK[:count], part), together[:count])
    unwidened = np.full((many, 128), np.nan, np.float32)
    no_scratch = SCRATCH._replace(wide_panel=np.zeros(0, np.float32))
    matrix.multiply(x_TK, unwidened, scratch=no_scratch)
    np.testing.assert_array_equal(unwidened, together)


@each_arithmetic
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 14, LEAST_ROWS_TO_WIDEN_ONCE])
def test_some_columns_of_a_product_are_those_of_all_and_nothing_else_is_written(
    arithmetic: Arithmetic, num_rows: int
) -> None:
    matrix = PackedMatrix(arithmetic, 192, 200)
    x_TK = random_rows(arithmetic, num_rows, 200)
    together = matrix.multiply(x_TK, np.full((num_rows, 192), np.nan, np.float32))
    step = cut_into_tiles(arithmetic, num_rows)[1]
    for first in range(0, 192 + step, step):
        for end in range(first, 192 + step, step):
            expected = np.full((num_rows, 192), np.nan, np.float32)
            expected[:, first:end] = together[:, first:end]
            part = np.full((num_rows, 192), np.nan, np.float32)
            matrix.multiply(x_TK, part, columns=(first, end))
            np.testing.assert_array_equal(part, expected)


@each_arithmetic
def test_greedy_tokens_are_the_arg_max_of_the_logits_and_ties_go_to_the_lowest(
    arithmetic: Arithmetic,
) -> None:
    vocab_size, num_rows = 300, 9
    matrix = PackedMatrix(arithmetic, vocab_size, 64)
    matrix.bias[:] = 0
    matrix.bias[vocab_size:] = -np.inf
    x_TK = random_rows(arithmetic, num_rows, 64)
    x_TK[4] = 0  # all logits are equal
    logits = matrix.multiply(x_TK, np.full((num_rows, 320), np.nan, np.float32))
    inputs = matrix.inputs(x_TK)
    tokens = np.full(num_rows, -1, np.int32)
    greedy_tokens(
        arithmetic, inputs.ctypes.data, inputs.strides[0], num_rows, matrix.panels.ctypes.data,
        matrix.padded_inputs, 5, matrix.bias.ctypes.data,
        np.full((num_rows, 64), np.nan, np.float32), tokens, np.zeros(num_rows, np.float32),
        SCRATCH,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, logits[:, :vocab_size].argmax(axis=1))
    assert tokens[4] == 0


@pytest.mark.parametrize("largest_input", [64, 127])
def test_integers_are_multiplied_alike_with_and_without_an_instruction_for_it(
    largest_input: int,
) -> None:
    x_TK = random_rows(integer_arithmetics()[0], 9, 321)
    outputs = []
    for arithmetic in integer_arithmetics(largest_input=largest_input):
        matrix = PackedMatrix(arithmetic, 129, 321)
        outputs.append(matrix.multiply(x_TK, np.full((9, 192), np.nan, np.float32)))
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize("largest_input", [64, 127])
def test_the_largest_integers_do_not_saturate(largest_input: int) -> None:
    for arithmetic in integer_arithmetics(largest_input=largest_input):
        matrix = PackedMatrix(arithmetic, 64, 128)
        for sign in (-1, 1):
            matrix.weight_NK[:] = sign
            scratch = np.zeros(128, np.float32)
            pack_panels(arithmetic, matrix.weight_NK, 128, matrix.panels, 0, 64, scratch)
            x_TK = np.ones((2, 128), np.float32)
            out_TN = matrix.multiply(x_TK, np.full((2, 64), np.nan, np.float32))
            np.testing.assert_allclose(out_TN - matrix.bias, sign * 128.0, rtol=1e-5)
