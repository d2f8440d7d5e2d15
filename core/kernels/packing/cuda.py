"""Packing on CUDA: rows gathered and scattered, any element type, neighbours by neighbouring
threads.

Letters: T packed rows, S rows elsewhere, H elements in a row.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

from typing import Any

from numba import cuda

THREADS = 256


def gather_rows(source_SH: Any, indices_T: Any, packed_TH: Any, *, threads: int = THREADS) -> None:
    """Row t of `packed_TH` becomes row `indices_T[t]` of the source."""
    gather_rows_kernel[packed_TH.shape[0], threads](source_SH, indices_T, packed_TH)


def scatter_rows(packed_TH: Any, indices_T: Any, target_SH: Any, *, threads: int = THREADS) -> None:
    """Row `indices_T[t]` of the target becomes row t of `packed_TH`; indices are distinct."""
    scatter_rows_kernel[packed_TH.shape[0], threads](packed_TH, indices_T, target_SH)


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
