"""Blocks of quantised weights -> float32.

The `gguf` library decodes every block type and is the reference. For the types that
common files consist of, the functions here do the same arithmetic in the same order,
2 to 7 times faster (measured): they write into the result and work on pieces that stay in the
cache. Results are equal bit for bit.

Letters: B blocks, N values of a block, S bytes of a block.
Layouts: ggml's `ggml-common.h`; arithmetic: ggml's `dequantize_row_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as library_dequantise

from core.errors import CorruptWeights

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Values decoded at a time: 256 KiB of float32, which fits a core's second-level cache.
_PIECE = 1 << 16


def block_layout(block_type: GGMLQuantizationType) -> tuple[int, int]:
    """Returns (values of a block, bytes of a block)."""
    return GGML_QUANT_SIZES[block_type]


def dequantise(raw: Bytes, *, block_type: GGMLQuantizationType, shape: tuple[int, ...]) -> Floats:
    """Decodes the bytes of one tensor.

    `raw` is one-dimensional and holds exactly the blocks of `shape`. The result is a new
    float32 array in C order. Raises CorruptWeights for a type that cannot be decoded.
    """
    with np.errstate(all="ignore"):  # damaged scales make inf and NaN, never a warning
        if block_type == GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(shape).astype(np.float32)
        if block_type == GGMLQuantizationType.F16:
            return raw.view("<f2").reshape(shape).astype(np.float32)
        if block_type == GGMLQuantizationType.BF16:
            return bf16_to_f32(raw.view("<u2")).reshape(shape)
        if block_type in _DECODERS:
            return _decode_in_pieces(raw, block_type).reshape(shape)
        return _decode_by_library(raw, block_type, shape)


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> Floats:
    """Widens bfloat16 bit patterns: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _decode_by_library(
    raw: Bytes, block_type: GGMLQuantizationType, shape: tuple[int, ...]
) -> Floats:
    num_values, num_bytes = block_layout(block_type)
    rows = raw.reshape(*shape[:-1], shape[-1] // num_values * num_bytes)
    try:
        return np.ascontiguousarray(library_dequantise(rows, block_type), np.float32)
    except NotImplementedError as error:
        raise CorruptWeights(f"tensors of type {block_type.name} cannot be decoded") from error


def _decode_in_pieces(raw: Bytes, block_type: GGMLQuantizationType) -> Floats:
    num_values, num_bytes = block_layout(block_type)
    decode = _DECODERS[block_type]
    blocks_BS = raw.reshape(-1, num_bytes)
    out_BN = np.empty((len(blocks_BS), num_values), np.float32)
    step = _PIECE // num_values
    for first in range(0, len(blocks_BS), step):
        decode(blocks_BS[first : first + step], out_BN[first : first + step])
    return out_BN


def half(blocks_BS: Bytes, offset: int) -> Floats:
    """The float16 at a byte offset of every block, as float32 [B, 1]."""
    return np.ascontiguousarray(blocks_BS[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _decode_q8_0(blocks_BS: Bytes, out_BN: Floats) -> None:
    out_BN[...] = blocks_BS[:, 2:].view(np.int8)
    out_BN *= half(blocks_BS, 0)


def _decode_q4_0(blocks_BS: Bytes, out_BN: Floats) -> None:
    nibbles = blocks_BS[:, 2:]
    out_BN[:, :16] = nibbles & 15
    out_BN[:, 16:] = nibbles >> 4
    out_BN -= 8.0
    out_BN *= half(blocks_BS, 0)


def _decode_q4_1(blocks_BS: Bytes, out_BN: Floats) -> None:
    nibbles = blocks_BS[:, 4:]
    out_BN[:, :16] = nibbles & 15
    out_BN[:, 16:] = nibbles >> 4
    out_BN *= half(blocks_BS, 0)
    out_BN += half(blocks_BS, 2)


def _decode_q5_0(blocks_BS: Bytes, out_BN: Floats) -> None:
    # The fifth bits of the 32 values are a little-endian uint32.
    high = np.unpackbits(blocks_BS[:, 2:6], axis=1, bitorder="little") << 4
    nibbles = blocks_BS[:, 6:]
    out_BN[:, :16] = (nibbles & 15) | high[:, :16]
    out_BN[:, 16:] = (nibbles >> 4) | high[:, 16:]
    out_BN -= 16.0
    out_BN *= half(blocks_BS, 0)


def k_scales_and_minimums(packed: Bytes) -> tuple[Floats, Floats]:
    """Unpacks the eight 6-bit scales and eight 6-bit minimums of Q4_K and Q5_K from 12 bytes.

    Returns two arrays [B, 8].
    """
    scales, minimums, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales_B8 = np.concatenate([scales & 63, (both & 15) | ((scales >> 2) & 48)], axis=1)
    minimums_B8 = np.concatenate([minimums & 63, (both >> 4) | ((minimums >> 2) & 48)], axis=1)
    return scales_B8.astype(np.float32), minimums_B8.astype(np.float32)


def _decode_q4_k(blocks_BS: Bytes, out_BN: Floats) -> None:
    scales_B8, minimums_B8 = k_scales_and_minimums(blocks_BS[:, 4:16])
    scales_B8 *= half(blocks_BS, 0)
    minimums_B8 *= half(blocks_BS, 2)
    nibbles = blocks_BS[:, 16:].reshape(-1, 4, 32)
    values = out_BN.reshape(-1, 4, 2, 32)
    values[:, :, 0] = nibbles & 15
    values[:, :, 1] = nibbles >> 4
    groups = out_BN.reshape(-1, 8, 32)
    groups *= scales_B8[:, :, None]
    groups -= minimums_B8[:, :, None]


def _decode_q5_k(blocks_BS: Bytes, out_BN: Floats) -> None:
    scales_B8, minimums_B8 = k_scales_and_minimums(blocks_BS[:, 4:16])
    scales_B8 *= half(blocks_BS, 0)
    minimums_B8 *= half(blocks_BS, 2)
    high = blocks_BS[:, 16:48]
    nibbles = blocks_BS[:, 48:].reshape(-1, 4, 32)
    groups = out_BN.reshape(-1, 8, 32)
    for pair in range(4):
        low_bit, high_bit = 2 * pair, 2 * pair + 1
        groups[:, low_bit] = (nibbles[:, pair] & 15) | (((high >> low_bit) & 1) << 4)
        groups[:, high_bit] = (nibbles[:, pair] >> 4) | (((high >> high_bit) & 1) << 4)
    groups *= scales_B8[:, :, None]
    groups -= minimums_B8[:, :, None]


def _decode_q6_k(blocks_BS: Bytes, out_BN: Floats) -> None:
    scales_B16 = np.ascontiguousarray(blocks_BS[:, 192:208]).view(np.int8).astype(np.float32)
    scales_B16 *= half(blocks_BS, 208)
    for part in range(2):  # 128 values each
        low = blocks_BS[:, 64 * part : 64 * part + 64]
        high = blocks_BS[:, 128 + 32 * part : 160 + 32 * part]
        values = out_BN[:, 128 * part : 128 * part + 128]
        values[:, 0:32] = (low[:, :32] & 15) | ((high & 3) << 4)
        values[:, 32:64] = (low[:, 32:] & 15) | ((high & 12) << 2)
        values[:, 64:96] = (low[:, :32] >> 4) | (high & 48)
        values[:, 96:128] = (low[:, 32:] >> 4) | ((high & 192) >> 2)
    out_BN -= 32.0
    groups = out_BN.reshape(-1, 16, 16)
    groups *= scales_B16[:, :, None]


@cache
def _iq2_xxs_groups() -> npt.NDArray[np.int8]:
    """All groups of eight values that IQ2_XXS can express, [128 * 256, 8].

    Row 256 * s + g is lattice point g with sign pattern s. Read off the library: a block
    with the scale bits 0 and d = 8 multiplies its groups by 8 * 0.5 * 0.25 = 1.
    """
    numbers = np.arange(128 * 256, dtype=np.uint32).reshape(-1, 8, 4)  # blocks of 8 x 4 groups
    blocks = np.zeros((len(numbers), 66), np.uint8)
    blocks[:, :2] = np.array([8.0], "<f2").view(np.uint8)
    parts = np.zeros((len(numbers), 8, 2), "<u4")
    for group in range(4):
        parts[:, :, 0] |= (numbers[:, :, group] & 255) << (8 * group)
        parts[:, :, 1] |= (numbers[:, :, group] >> 8) << (7 * group)
    blocks[:, 2:] = parts.reshape(len(numbers), 16).view(np.uint8)
    values = library_dequantise(blocks, GGMLQuantizationType.IQ2_XXS)
    return values.astype(np.int8).reshape(-1, 8)


def _decode_iq2_xxs(blocks_BS: Bytes, out_BN: Floats) -> None:
    # Eight parts of 32 values: four lattice points, then four 7-bit sign patterns and a scale.
    parts = np.ascontiguousarray(blocks_BS[:, 2:]).view("<u4").reshape(-1, 8, 2)
    points = np.ascontiguousarray(parts[:, :, 0]).view(np.uint8).reshape(-1, 8, 4)
    signs = (parts[:, :, 1, None] >> np.array([0, 7, 14, 21], np.uint32)) & 127
    scales_B8 = half(blocks_BS, 0) * (np.float32(0.5) + (parts[:, :, 1] >> 28).astype(np.float32))
    scales_B8 *= np.float32(0.25)
    # A group of eight int8 is moved as one uint64.
    groups = _iq2_xxs_groups().view(np.uint64)[:, 0]
    rows = groups[(signs << 8) | points]
    values = out_BN.reshape(-1, 8, 32)
    values[...] = rows.view(np.int8).reshape(-1, 8, 32)
    values *= scales_B8[:, :, None]


_DECODERS: dict[GGMLQuantizationType, Callable[[Bytes, Floats], None]] = {
    GGMLQuantizationType.Q4_0: _decode_q4_0,
    GGMLQuantizationType.Q4_1: _decode_q4_1,
    GGMLQuantizationType.Q5_0: _decode_q5_0,
    GGMLQuantizationType.Q8_0: _decode_q8_0,
    GGMLQuantizationType.Q4_K: _decode_q4_k,
    GGMLQuantizationType.Q5_K: _decode_q5_k,
    GGMLQuantizationType.Q6_K: _decode_q6_k,
    GGMLQuantizationType.IQ2_XXS: _decode_iq2_xxs,
}
