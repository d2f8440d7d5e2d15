"""Gated SiLU, the non-linearity between a decoder's gate/up and down projections
(Shazeer 2020, "GLU Variants Improve Transformer").

Letters: T rows, F intermediate size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def silu_multiply(gate_TF: FloatArray, up_TF: FloatArray) -> FloatArray:
    """SiLU(gate) * up, where SiLU(x) = x / (1 + exp(-x))."""
    wide_TF = gate_TF.astype(np.float64)
    # exp overflows to infinity below -709, and x / inf is the right limit, 0.
    with np.errstate(over="ignore"):
        silu_TF = wide_TF / (1.0 + np.exp(-wide_TF))
    return (silu_TF * up_TF).astype(np.float32)
