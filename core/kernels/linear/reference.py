"""A linear projection, of floats or of integers with scales.

Letters: T rows, K inputs, N outputs, G groups of neighbouring inputs, E inputs of a group.
Weights are [out, in], as checkpoints store them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class Quantised(NamedTuple):
    """Rows of int8 whose groups have scales."""

    integers_TK: npt.NDArray[np.int8]
    scales_TG: FloatArray


class NibbleMatrix(NamedTuple):
    """Weights `scale x integer + minimum`, with integers from 0 to 15."""

    integers_NK: npt.NDArray[np.uint8]
    scales_NG: npt.NDArray[np.float16]
    minima_NG: npt.NDArray[np.float16]


def linear(x_TK: FloatArray, weight_NK: FloatArray, bias_N: FloatArray | None = None) -> FloatArray:
    """x @ weight.T + bias, summed in float64 and rounded once."""
    product_TN = x_TK.astype(np.float64) @ weight_NK.astype(np.float64).T
    if bias_N is not None:
        product_TN += bias_N
    return product_TN.astype(np.float32)


def quantise(x_TK: FloatArray, *, group: int, largest: int = 127) -> Quantised:
    """Rounds to multiples of a scale, of which the largest magnitude in each group has `largest`.

    A group of numbers below 1e-30 becomes zero.
    """
    most = np.float32(largest)
    x_TGE = x_TK.reshape(len(x_TK), -1, group)
    largest_TG = np.abs(x_TGE).max(axis=2)
    inverse_TG = np.zeros_like(largest_TG)
    np.divide(most, largest_TG, out=inverse_TG, where=largest_TG > np.float32(1e-30))
    integers_TGE = np.rint(x_TGE * inverse_TG[:, :, None]).astype(np.int8)
    return Quantised(integers_TGE.reshape(x_TK.shape), largest_TG * (np.float32(1) / most))


def spread(x_TK: FloatArray, *, group: int) -> FloatArray:
    """Multiplies the quarters of each group by the Hadamard matrix of size four (which is four
    times its own inverse), so that great numbers are shared out."""
    first, second, third, fourth = x_TK.reshape(len(x_TK), -1, 4, group // 4).transpose(2, 0, 1, 3)
    sums, differences = (first + second, third + fourth), (first - second, third - fourth)
    quarters = [
        *(sums[0] + sums[1], differences[0] + differences[1]),
        *(sums[0] - sums[1], differences[0] - differences[1]),
    ]
    return np.stack(quarters, axis=2).reshape(x_TK.shape)


def quantised_linear(
    x_TK: FloatArray,
    weight_NK: FloatArray,
    bias_N: FloatArray,
    *,
    group: int,
    largest_input: int = 127,
) -> FloatArray:
    """As `linear`, with both operands spread and quantised, weights with one scale for each output:
    the groups' sums are exact integers, and those, scaled, are added in float32 in the order of the
    groups."""
    rows = quantise(spread(x_TK, group=group), group=group, largest=largest_input)
    weight_NK = spread(weight_NK, group=group) * np.float32(0.25)
    columns = quantise(weight_NK, group=weight_NK.shape[1])
    result_TN = np.zeros((len(x_TK), len(weight_NK)), np.float32)
    for index in range(rows.scales_TG.shape[1]):
        inner = slice(index * group, (index + 1) * group)
        left, right = rows.integers_TK[:, inner], columns.integers_TK[:, inner]
        sums_TN = left.astype(np.int32) @ right.astype(np.int32).T
        result_TN += sums_TN * rows.scales_TG[:, index, None]
    return (bias_N + result_TN * columns.scales_TG[:, 0]).astype(np.float32)


def nibble_linear(
    x_TK: FloatArray, weight: NibbleMatrix, bias_N: FloatArray, *, group: int
) -> FloatArray:
    """As `quantised_linear`, with weights `scale x integer + minimum` whose groups are parts of
    those of the inputs: a group adds its scaled sum of integers, and then its minimum times the
    scaled sum of its inputs' integers."""
    rows = quantise(x_TK, group=group)
    result_TN = np.tile(bias_N, (len(x_TK), 1))
    size = x_TK.shape[1] // weight.scales_NG.shape[1]
    for index in range(weight.scales_NG.shape[1]):
        inner = slice(index * size, (index + 1) * size)
        left, right = rows.integers_TK[:, inner].astype(np.int32), weight.integers_NK[:, inner]
        scale_T1 = rows.scales_TG[:, index * size // group, None]
        sums_TN = left @ right.astype(np.int32).T
        result_TN += sums_TN * (scale_T1 * weight.scales_NG[:, index].astype(np.float32))
        scaled_T1 = left.sum(axis=1, keepdims=True) * scale_T1
        result_TN += weight.minima_NG[:, index].astype(np.float32) * scaled_T1
    return result_TN.astype(np.float32)
