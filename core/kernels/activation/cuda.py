"""Gated SiLU on CUDA: one thread an element.

Letters: T rows, F intermediate size. All arrays are in the number format.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from core.kernels.cuda_numbers import number_format_of

THREADS = 256


def silu_multiply(
    gate_TF: Any, up_TF: Any, out_TF: Any, *, number_format: str, threads: int = THREADS
) -> None:
    """SiLU(gate) * up into `out_TF`, which may be `gate_TF` or `up_TF`."""
    num_rows, width = gate_TF.shape
    grid = ((width + threads - 1) // threads, num_rows)
    silu_multiply_kernel(number_format)[grid, threads](gate_TF, up_TF, out_TF)


@functools.cache
def silu_multiply_kernel(number_format: str) -> Any:
    load, store = number_format_of(number_format)

    @cuda.jit
    def kernel(gate_TF, up_TF, out_TF):
        row = cuda.blockIdx.y
        f = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if f < gate_TF.shape[1]:
            gate = load(gate_TF[row, f])
            # Through the exponential of a negative number, which cannot overflow.
            decay = np.float32(math.exp(-abs(gate)))
            sigmoid = (np.float32(1.0) if gate >= 0 else decay) / (np.float32(1.0) + decay)
            out_TF[row, f] = store(gate * sigmoid * load(up_TF[row, f]))

    return kernel
