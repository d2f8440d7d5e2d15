"""Gated SiLU on CUDA: one thread an element.

Letters: T rows, F intermediate size.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from core.kernels.cuda_launch import Launch
from core.kernels.cuda_numbers import number_format_of

THREADS = 256


def silu_multiply(
    gate_up_T2F: Any, bias_2F: Any, out_TF: Any, *, number_format: str, launch: Launch
) -> None:
    """SiLU(gate) * up into `out_TF`, in the number format.

    A row of `gate_up_T2F` is its gates and then its ups, float32, before their biases.
    """
    num_rows, width = out_TF.shape
    threads = launch.threads(THREADS)
    grid = ((width + threads - 1) // threads, num_rows)
    silu_multiply_kernel(number_format)[grid, threads, launch.stream](gate_up_T2F, bias_2F, out_TF)


@functools.cache
def silu_multiply_kernel(number_format: str) -> Any:
    store = number_format_of(number_format).store

    @cuda.jit
    def kernel(gate_up_T2F, bias_2F, out_TF):
        row, width = cuda.blockIdx.y, out_TF.shape[1]
        f = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if f < width:
            gate = gate_up_T2F[row, f] + bias_2F[f]
            up = gate_up_T2F[row, width + f] + bias_2F[width + f]
            # Through the exponential of a negative number, which cannot overflow.
            decay = np.float32(math.exp(-abs(gate)))
            sigmoid = (np.float32(1.0) if gate >= 0 else decay) / (np.float32(1.0) + decay)
            out_TF[row, f] = store(gate * sigmoid * up)

    return kernel
