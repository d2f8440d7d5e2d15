"""Root-mean-square norm on CUDA: one block a row.

Letters: T rows, H elements in a row. Norm weights are float32, everything else is in the
number format.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from core.kernels.cuda_numbers import block_sum, number_format_of

THREADS = 256  # a power of two: block_sum halves it


def rms_norm(
    x_TH: Any, weight_H: Any, out_TH: Any, *, eps: float, number_format: str, threads: int = THREADS
) -> None:
    """Norms every row into `out_TH`."""
    kernel = rms_norm_kernel(number_format, threads)
    kernel[x_TH.shape[0], threads](x_TH, weight_H, np.float32(eps), out_TH)


def add_rms_norm(
    x_TH: Any,
    residual_TH: Any,
    weight_H: Any,
    out_TH: Any,
    *,
    eps: float,
    number_format: str,
    threads: int = THREADS,
) -> None:
    """Adds x to the residual stream in place and norms the sum, as rounded to the format."""
    kernel = add_rms_norm_kernel(number_format, threads)
    kernel[x_TH.shape[0], threads](x_TH, residual_TH, weight_H, np.float32(eps), out_TH)


@functools.cache
def rms_norm_kernel(number_format: str, threads: int) -> Any:
    load, store = number_format_of(number_format)

    @cuda.jit
    def kernel(x_TH, weight_H, eps, out_TH):
        partials = cuda.shared.array(threads, np.float32)
        row, width = cuda.blockIdx.x, x_TH.shape[1]
        total = np.float32(0.0)
        for h in range(cuda.threadIdx.x, width, threads):
            value = load(x_TH[row, h])
            total += value * value
        mean = block_sum(total, partials) / np.float32(width)
        scale = np.float32(1.0) / math.sqrt(mean + eps)
        for h in range(cuda.threadIdx.x, width, threads):
            out_TH[row, h] = store(load(x_TH[row, h]) * scale * weight_H[h])

    return kernel


@functools.cache
def add_rms_norm_kernel(number_format: str, threads: int) -> Any:
    load, store = number_format_of(number_format)

    @cuda.jit
    def kernel(x_TH, residual_TH, weight_H, eps, out_TH):
        partials = cuda.shared.array(threads, np.float32)
        row, width = cuda.blockIdx.x, x_TH.shape[1]
        total = np.float32(0.0)
        for h in range(cuda.threadIdx.x, width, threads):
            residual = store(load(x_TH[row, h]) + load(residual_TH[row, h]))
            residual_TH[row, h] = residual
            value = load(residual)
            total += value * value
        mean = block_sum(total, partials) / np.float32(width)
        scale = np.float32(1.0) / math.sqrt(mean + eps)
        # Every thread reads back only what it wrote itself.
        for h in range(cuda.threadIdx.x, width, threads):
            out_TH[row, h] = store(load(residual_TH[row, h]) * scale * weight_H[h])

    return kernel
