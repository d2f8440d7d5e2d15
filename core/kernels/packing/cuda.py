"""Packing on CUDA: rows gathered and scattered, neighbours by neighbouring threads.

Letters: T packed rows, S rows elsewhere, H elements in a row.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from core.kernels.cuda_launch import Launch
from core.kernels.cuda_numbers import number_format_of

THREADS = 256


def gather_rows(source_SH: Any, indices_T: Any, packed_TH: Any, *, launch: Launch) -> None:
    """Row t of `packed_TH` becomes row `indices_T[t]` of the source; any element type."""
    grid = (packed_TH.shape[0], launch.threads(THREADS), launch.stream)
    gather_rows_kernel[grid](source_SH, indices_T, packed_TH)


def scatter_rows(packed_TH: Any, indices_T: Any, target_SH: Any, *, launch: Launch) -> None:
    """Row `indices_T[t]` of the target becomes row t of `packed_TH`; indices are distinct."""
    grid = (packed_TH.shape[0], launch.threads(THREADS), launch.stream)
    scatter_rows_kernel[grid](packed_TH, indices_T, target_SH)


def gather_widened_rows(
    source_SH: Any, indices_T: Any, out_TH: Any, *, number_format: str, launch: Launch
) -> None:
    """Like `gather_rows`, from the number format to float32."""
    grid = (out_TH.shape[0], launch.threads(THREADS), launch.stream)
    gather_widened_rows_kernel(number_format)[grid](source_SH, indices_T, out_TH)


@cuda.jit
def gather_rows_kernel(source_SH, indices_T, packed_TH):
    row = cuda.blockIdx.x
    for h in range(cuda.threadIdx.x, packed_TH.shape[1], cuda.blockDim.x):
        packed_TH[row, h] = source_SH[indices_T[row], h]


@cuda.jit
def scatter_rows_kernel(packed_TH, indices_T, target_SH):
    row = cuda.blockIdx.x
    for h in range(cuda.threadIdx.x, packed_TH.shape[1], cuda.blockDim.x):
        target_SH[indices_T[row], h] = packed_TH[row, h]


@functools.cache
def gather_widened_rows_kernel(number_format: str) -> Any:
    load = number_format_of(number_format).load

    @cuda.jit
    def kernel(source_SH, indices_T, out_TH):
        row = cuda.blockIdx.x
        for h in range(cuda.threadIdx.x, out_TH.shape[1], cuda.blockDim.x):
            out_TH[row, h] = load(source_SH[indices_T[row], h])

    return kernel
