"""What follows the product of q, k and v on CUDA: biases, norms of heads, rotary embedding and
KV write, in one pass. One block for each row and head.

Letters as in `reference`, and C columns: of all query heads, then of all key heads, then of all
value heads; S slots, M blocks of the longest sequence. The cache is in the number format,
everything else is float32.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from core.kernels.cuda_launch import Launch
from core.kernels.cuda_numbers import block_sum, number_format_of

THREADS = 64  # a power of two: block_sum halves it


def rotate_and_write(
    qkv_TC: Any,
    bias_C: Any,
    *,
    q_norm_D: Any,
    k_norm_D: Any,
    norm_eps: float | None,
    slots_T: Any,
    positions_T: Any,
    block_tables_SM: Any,
    cos_LF: Any,
    sin_LF: Any,
    keys_BPKD: Any,
    values_BPKD: Any,
    out_TND: Any,
    number_format: str,
    launch: Launch,
) -> None:
    """Rotates q into `out_TND`, and writes rotated k, and v, to the cache.

    Heads of q and k are normed first, unless `norm_eps` is None. Rows at negative positions are
    padding and left alone. The cache's heads may be wider than D; what is beyond is not written.
    """
    grid = (qkv_TC.shape[0], qkv_TC.shape[1] // out_TND.shape[2])
    threads = launch.threads(THREADS)
    kernel = rotate_and_write_kernel(number_format, threads, norm_eps is not None)
    kernel[grid, threads, launch.stream](
        qkv_TC,
        bias_C,
        q_norm_D,
        k_norm_D,
        np.float32(norm_eps or 0.0),
        slots_T,
        positions_T,
        block_tables_SM,
        cos_LF,
        sin_LF,
        keys_BPKD,
        values_BPKD,
        out_TND,
    )


@functools.cache
def rotate_and_write_kernel(number_format: str, threads: int, norms_heads: bool) -> Any:
    store = number_format_of(number_format).store

    @cuda.jit(device=True)
    def norm_scale(qkv_TC, bias_C, row, column, head_dim, eps, partials):
        """What a head is multiplied by so that its mean square is 1."""
        total = np.float32(0.0)
        for d in range(cuda.threadIdx.x, head_dim, threads):
            value = qkv_TC[row, column + d] + bias_C[column + d]
            total += value * value
        mean = block_sum(total, partials) / np.float32(head_dim)
        return np.float32(1.0) / math.sqrt(mean + eps)

    @cuda.jit
    def kernel(
        qkv_TC,
        bias_C,
        q_norm_D,
        k_norm_D,
        eps,
        slots_T,
        positions_T,
        block_tables_SM,
        cos_LF,
        sin_LF,
        keys_BPKD,
        values_BPKD,
        out_TND,
    ):
        partials = cuda.shared.array(threads, np.float32)
        row, head, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        num_heads, head_dim = out_TND.shape[1], out_TND.shape[2]
        num_kv_heads, half = keys_BPKD.shape[2], out_TND.shape[2] // 2
        position, column = positions_T[row], head * head_dim
        if position < 0:
            return
        offset = position % keys_BPKD.shape[1]
        block = block_tables_SM[slots_T[row], position // keys_BPKD.shape[1]]
        if head >= num_heads + num_kv_heads:
            kv_head = head - num_heads - num_kv_heads
            for d in range(thread, head_dim, threads):
                value = qkv_TC[row, column + d] + bias_C[column + d]
                values_BPKD[block, offset, kv_head, d] = store(value)
            return
        scale = np.float32(1.0)
        if norms_heads:
            scale = norm_scale(qkv_TC, bias_C, row, column, head_dim, eps, partials)
        for f in range(thread, half, threads):
            cos, sin = cos_LF[position, f], sin_LF[position, f]
            first = qkv_TC[row, column + f] + bias_C[column + f]
            second = qkv_TC[row, column + half + f] + bias_C[column + half + f]
            if norms_heads:
                is_query = head < num_heads
                first *= scale * (q_norm_D[f] if is_query else k_norm_D[f])
                second *= scale * (q_norm_D[half + f] if is_query else k_norm_D[half + f])
            turned_first, turned_second = first * cos - second * sin, second * cos + first * sin
            if head < num_heads:
                out_TND[row, head, f] = turned_first
                out_TND[row, head, half + f] = turned_second
            else:
                keys_BPKD[block, offset, head - num_heads, f] = store(turned_first)
                keys_BPKD[block, offset, head - num_heads, half + f] = store(turned_second)

    return kernel
