"""Blocks of weights of 4 bits -> the integers, scales and minima that the file holds.

Letters: B blocks, S bytes of a block, N rows and K columns of a matrix, G groups of 32 columns.
Layouts: see `core.weights.dequantise`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from core.weights.dequantise import Bytes, Floats, block_layout, half, k_scales_and_minimums

NIBBLE_TYPES = (
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q4_K,
)
GROUP_SIZE = 32
_K_GROUPS = 8  # groups of a block of Q4_K
_OFFSET = 8  # subtracted from the integers of Q4_0


class Nibbles(NamedTuple):
    """A matrix of weights `scale x integer + minimum`.

    Scales and minima are those of the file; of Q4_K, where they are products, rounded to float16.
    """

    integers_NK: npt.NDArray[np.uint8]  # 0 to 15
    scales_NG: npt.NDArray[np.float16]
    minima_NG: npt.NDArray[np.float16]


def decode_nibbles(
    raw: Bytes, *, block_type: GGMLQuantizationType, shape: tuple[int, int]
) -> Nibbles:
    """Decodes the bytes of a matrix of one of NIBBLE_TYPES; see `dequantise`."""
    _, num_bytes = block_layout(block_type)
    blocks_BS = raw.reshape(-1, num_bytes)
    with np.errstate(all="ignore"):  # damaged scales make inf and NaN, never a warning
        if block_type == GGMLQuantizationType.Q4_K:
            integers, scales, minima = _decode_q4_k(blocks_BS)
        else:
            integers = _split(blocks_BS[:, -GROUP_SIZE // 2 :])
            scales = half(blocks_BS, 0)
            is_offset = block_type == GGMLQuantizationType.Q4_0
            minima = -_OFFSET * scales if is_offset else half(blocks_BS, 2)
        return Nibbles(
            integers.reshape(shape),
            scales.astype(np.float16).reshape(shape[0], -1),
            minima.astype(np.float16).reshape(shape[0], -1),
        )


def _split(nibbles: Bytes) -> Bytes:
    """Lower nibbles, then upper ones, along the last axis."""
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)


def _decode_q4_k(blocks_BS: Bytes) -> tuple[Bytes, Floats, Floats]:
    scales_B8, minimums_B8 = k_scales_and_minimums(blocks_BS[:, 4:16])
    scales_B8 *= half(blocks_BS, 0)
    minimums_B8 *= half(blocks_BS, 2)
    nibbles = blocks_BS[:, 16:].reshape(-1, _K_GROUPS // 2, GROUP_SIZE)
    return _split(nibbles), scales_B8, -minimums_B8
