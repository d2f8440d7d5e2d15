"""Root-mean-square norm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").

Letters: T rows, H elements in a row. A row is whatever is normed: a hidden state, or one
head of q or k (Qwen3), where H is head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class AddedNorm(NamedTuple):
    """A sum and its norm."""

    sum_TH: FloatArray
    normed_TH: FloatArray


def rms_norm(x_TH: FloatArray, weight_H: FloatArray, *, eps: float) -> FloatArray:
    """Scales every row to a root mean square of 1, times `weight_H`. The last axis is the row."""
    wide_TH = x_TH.astype(np.float64)
    mean_square_T1 = np.mean(wide_TH * wide_TH, axis=-1, keepdims=True)
    return (wide_TH / np.sqrt(mean_square_T1 + eps) * weight_H).astype(np.float32)


def add_rms_norm(
    x_TH: FloatArray, residual_TH: FloatArray, weight_H: FloatArray, *, eps: float
) -> AddedNorm:
    """Adds `x_TH` to the residual stream and norms the sum."""
    sum_TH = residual_TH + x_TH
    return AddedNorm(sum_TH, rms_norm(sum_TH, weight_H, eps=eps))
