"""Rows in blocks of int8, on the CPU: the same bits on every CPU.

Letters: T rows, H elements of a row, W bytes of a row; G = H, or H with zeros behind it.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from core.kernels.blocks.layout import BLOCK, MOST, NOT_FINITE
from core.kernels.compile import kernel

_MAGNITUDE = np.int32(0x7FFFFFFF)  # the bits of a float32 without its sign: ordered as it is
_INFINITY = np.int32(0x7F800000)


@kernel
def encode_rows(rows_TG, num_rows, size, out_TW):
    """Writes the first `num_rows` rows, of `size` elements, in blocks."""
    for t in range(num_rows):
        row, bits, out = rows_TG[t], rows_TG[t].view(np.int32), out_TW[t]
        where = size
        for first in range(0, size, BLOCK):
            end = min(first + BLOCK, size)
            scale_bits = encode_block(row[first:end], bits[first:end], out[first:end])
            out[where], out[where + 1] = scale_bits & 0xFF, scale_bits >> 8
            where += 2


@kernel
def encode_block(block, bits, out):
    """Writes a block's integers; returns the bits of its scale."""
    largest = np.int32(0)
    for e in range(len(bits)):
        largest = max(largest, np.int32(bits[e] & _MAGNITUDE))
    if largest >= _INFINITY:
        out[:] = np.uint8(NOT_FINITE & 0xFF)
        return np.uint32(0)
    if largest == 0:
        out[:] = 0
        return np.uint32(0)
    exact = np.float32(np.int32(largest).view(np.float32) / np.float32(MOST))
    scale_bits = np.uint32(max(int((exact.view(np.uint32) + 0xFFFF) >> 16), 1))
    scale = np.uint32(scale_bits << 16).view(np.float32)
    for e in range(len(block)):
        out[e] = np.int8(np.rint(block[e] / scale))
    return scale_bits


@kernel
def decode_rows(rows_TW, num_rows, size, out_TG):
    """Writes the first `num_rows` rows, of `size` elements, as numbers; NaN for what was none."""
    for t in range(num_rows):
        row, out = rows_TW[t], out_TG[t]
        where = size
        for first in range(0, size, BLOCK):
            scale_bits = np.uint32(row[where]) | np.uint32(row[where + 1]) << 8
            scale = np.uint32(scale_bits << 16).view(np.float32)
            for h in range(first, min(first + BLOCK, size)):
                integer = np.int8(row[h])
                number = np.float32(integer) * scale
                out[h] = np.float32(np.nan) if integer == NOT_FINITE else number
            where += 2
