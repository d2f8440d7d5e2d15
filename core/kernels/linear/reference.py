"""A linear projection.

Letters: T rows, K inputs, N outputs. Weights are [out, in], as checkpoints store them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def linear(x_TK: FloatArray, weight_NK: FloatArray, bias_N: FloatArray | None = None) -> FloatArray:
    """x @ weight.T + bias, summed in float64 and rounded once."""
    product_TN = x_TK.astype(np.float64) @ weight_NK.astype(np.float64).T
    if bias_N is not None:
        product_TN += bias_N
    return product_TN.astype(np.float32)
