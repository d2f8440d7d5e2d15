"""Rows in blocks of int8 (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

Letters: T rows, H elements of a row, W bytes of a row, B blocks, E elements of a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from core.kernels.blocks.layout import BLOCK, MOST, NOT_FINITE, num_blocks, scale_bits

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def encode_rows(rows_TH: FloatArray) -> ByteArray:
    """The rows' bytes [T, W].

    A scale is a 127th of the largest magnitude in its block, rounded up: so an element is off by
    half of its scale at most. A block with an element that is not finite has no number in it.
    """
    rows_TBE = _cut(rows_TH)
    is_finite_TB1 = np.isfinite(rows_TBE).all(axis=2, keepdims=True)
    numbers_TBE = np.where(is_finite_TB1, rows_TBE, np.float32(0))
    largest_TB = np.abs(numbers_TBE).max(axis=2)
    bits_TB = ((largest_TB / np.float32(MOST)).view(np.uint32) + 0xFFFF) >> 16
    bits_TB = np.where(largest_TB > 0, np.maximum(bits_TB, 1), 0).astype("<u2")
    steps_TBE = np.zeros_like(numbers_TBE)
    scales_TB1 = _widened(bits_TB)[:, :, None]
    np.divide(numbers_TBE, scales_TB1, out=steps_TBE, where=scales_TB1 > 0)
    integers_TBE = np.where(is_finite_TB1, np.rint(steps_TBE), NOT_FINITE).astype(np.int8)
    integers_TH = integers_TBE.reshape(len(rows_TH), -1)[:, : rows_TH.shape[1]]
    return np.concatenate([integers_TH.view(np.uint8), bits_TB.view(np.uint8)], axis=1)


def decode_rows(rows_TW: ByteArray, *, size: int) -> FloatArray:
    """The rows [T, H] of `size` elements; NaN for what was not finite."""
    integers_TH = np.ascontiguousarray(rows_TW[:, :size]).view(np.int8)
    scales_TH = _widened(scale_bits(rows_TW, size=size)).repeat(BLOCK, axis=1)[:, :size]
    numbers_TH = integers_TH.astype(np.float32) * scales_TH
    return np.where(integers_TH == NOT_FINITE, np.float32(np.nan), numbers_TH)


def _cut(rows_TH: FloatArray) -> FloatArray:
    """Blocks [T, B, E], the last one filled up with zeros."""
    missing = num_blocks(rows_TH.shape[1]) * BLOCK - rows_TH.shape[1]
    return np.pad(rows_TH, ((0, 0), (0, missing))).reshape(len(rows_TH), -1, BLOCK)


def _widened(bits: npt.NDArray[np.uint16]) -> FloatArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
