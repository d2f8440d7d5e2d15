"""Rotary embedding and KV write on CUDA: one block a row; threads along x share a head.

Letters as in `reference`. Tables are float32, everything else is in the number format.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from core.kernels.cuda_numbers import number_format_of

THREADS = (32, 4)


def rotate_and_write(
    q_TND: Any,
    k_TKD: Any,
    v_TKD: Any,
    *,
    positions_T: Any,
    block_ids_T: Any,
    cos_LF: Any,
    sin_LF: Any,
    keys_BPKD: Any,
    values_BPKD: Any,
    out_TND: Any,
    number_format: str,
    threads: tuple[int, int] = THREADS,
) -> None:
    """Rotates q into `out_TND` (which may be `q_TND`) and writes rotated k, and v, to the cache."""
    kernel = rotate_and_write_kernel(number_format)
    kernel[q_TND.shape[0], threads](
        q_TND,
        k_TKD,
        v_TKD,
        positions_T,
        block_ids_T,
        cos_LF,
        sin_LF,
        keys_BPKD,
        values_BPKD,
        out_TND,
    )


@functools.cache
def rotate_and_write_kernel(number_format: str) -> Any:
    load, store = number_format_of(number_format)

    @cuda.jit
    def kernel(
        q_TND,
        k_TKD,
        v_TKD,
        positions_T,
        block_ids_T,
        cos_LF,
        sin_LF,
        keys_BPKD,
        values_BPKD,
        out_TND,
    ):
        row, x, y = cuda.blockIdx.x, cuda.threadIdx.x, cuda.threadIdx.y
        num_x, num_y = cuda.blockDim.x, cuda.blockDim.y
        head_dim, half = q_TND.shape[2], q_TND.shape[2] // 2
        position, block = positions_T[row], block_ids_T[row]
        offset = position % keys_BPKD.shape[1]
        for f in range(x, half, num_x):
            cos, sin = cos_LF[position, f], sin_LF[position, f]
            for n in range(y, q_TND.shape[1], num_y):
                first, second = load(q_TND[row, n, f]), load(q_TND[row, n, f + half])
                out_TND[row, n, f] = store(first * cos - second * sin)
                out_TND[row, n, f + half] = store(second * cos + first * sin)
            for n in range(y, k_TKD.shape[1], num_y):
                first, second = load(k_TKD[row, n, f]), load(k_TKD[row, n, f + half])
                keys_BPKD[block, offset, n, f] = store(first * cos - second * sin)
                keys_BPKD[block, offset, n, f + half] = store(second * cos + first * sin)
        for n in range(y, v_TKD.shape[1], num_y):
            for d in range(x, head_dim, num_x):
                values_BPKD[block, offset, n, d] = v_TKD[row, n, d]

    return kernel
