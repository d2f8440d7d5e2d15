"""Paged attention on CUDA: one block per (row, KV head, split of the positions).

Softmax is computed online (Milakov and Gimelshein 2018) over tiles of TILE positions; splits
of SPLIT positions run side by side and are merged in order (the "flash-decoding" of Dao et
al. 2023). Tiles and splits are cut by position, never by load, so a row's result depends on
nothing else in the batch. A tile of keys is read once for all query heads of the group.

Letters as in `reference`, and X splits, G = N / K query heads a KV head.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from core.kernels.cuda_numbers import number_format_of

# Along elements of a head, and along heads or positions.
THREADS = (32, 4)
TILE = 16
SPLIT = 512


class Partials(NamedTuple):
    """Float32 results of the splits: sums not yet divided, maxima and sums of the softmax."""

    sums_TXND: Any
    maxima_TXN: Any
    totals_TXN: Any


def num_splits(longest: int, *, split: int = SPLIT) -> int:
    """Splits that sequences of up to `longest` positions need."""
    return _ceil_div(longest, split)


def make_partials(num_rows: int, splits: int, num_heads: int, head_dim: int) -> Partials:
    """Room for `paged_attention` to work in; use it again for as many rows or fewer."""
    shape = (num_rows, splits, num_heads)
    return Partials(
        cuda.device_array((*shape, head_dim), np.float32),
        cuda.device_array(shape, np.float32),
        cuda.device_array(shape, np.float32),
    )


def paged_attention(
    q_TND: Any,
    keys_BPKD: Any,
    values_BPKD: Any,
    *,
    block_tables_RC: Any,
    runs_T: Any,
    positions_T: Any,
    window: int | None,
    partials: Partials,
    out_TND: Any,
    number_format: str,
    threads: tuple[int, int] = THREADS,
    split: int = SPLIT,
) -> None:
    """Attends from every row; row t belongs to run `runs_T[t]`, at `positions_T[t]`.

    `partials` has as many splits as the longest sequence needs, or more.
    """
    num_rows, num_heads, head_dim = q_TND.shape
    _, block_size, num_kv_heads, _ = keys_BPKD.shape
    attend = attend_kernel(
        number_format,
        head_dim=head_dim,
        group_size=num_heads // num_kv_heads,
        block_size=block_size,
        threads=threads,
        split=split,
    )
    grid = (num_rows, num_kv_heads, partials.maxima_TXN.shape[1])
    attend[grid, threads](
        q_TND,
        keys_BPKD,
        values_BPKD,
        block_tables_RC,
        runs_T,
        positions_T,
        np.int32(window or 0),
        *partials,
    )
    merge = merge_kernel(number_format)
    merge[(num_rows, num_heads), threads[0]](*partials, out_TND)


@functools.cache
def attend_kernel(
    number_format: str,
    *,
    head_dim: int,
    group_size: int,
    block_size: int,
    threads: tuple[int, int],
    split: int,
) -> Any:
    load, _ = number_format_of(number_format)
    num_x, num_y = threads
    # One column more than needed: the threads of a score step then read different banks.
    key_shape, weight_shape = (TILE, head_dim + 1), (group_size, TILE)
    query_shape = (group_size, head_dim)
    # Loops over these have a fixed number of turns, so that the sums stay in registers.
    num_i, num_k = _ceil_div(group_size, num_y), _ceil_div(head_dim, num_x)
    scale = np.float32(head_dim**-0.5)

    @cuda.jit(device=True)
    def score_tile(queries_GD, tile_keys, tile, start, end, weights_GJ):
        """Scores of a tile's positions, -inf outside of start and end."""
        for g in range(cuda.threadIdx.y, group_size, num_y):
            for j in range(cuda.threadIdx.x, TILE, num_x):
                score = -np.float32(np.inf)
                if start <= tile + j < end:
                    score = np.float32(0.0)
                    for d in range(head_dim):
                        score += queries_GD[g, d] * tile_keys[j, d]
                weights_GJ[g, j] = score

    @cuda.jit(device=True)
    def soften_tile(weights_GJ, maxima_G, totals_G, decays_G):
        """Turns scores into weights below the new maxima; says how much older sums decay."""
        first = cuda.threadIdx.y * num_x + cuda.threadIdx.x
        for g in range(first, group_size, num_x * num_y):
            largest = maxima_G[g]
            for j in range(TILE):
                largest = max(largest, weights_GJ[g, j])
            # At the first tile this is exp(-inf) = 0: there is nothing yet to decay.
            decay = np.float32(math.exp(maxima_G[g] - largest))
            total = totals_G[g] * decay
            for j in range(TILE):
                weight = np.float32(math.exp(weights_GJ[g, j] - largest))
                weights_GJ[g, j] = weight
                total += weight
            maxima_G[g], totals_G[g], decays_G[g] = largest, total, decay

    @cuda.jit
    def kernel(
        q_TND,
        keys_BPKD,
        values_BPKD,
        block_tables_RC,
        runs_T,
        positions_T,
        window,
        sums_TXND,
        maxima_TXN,
        totals_TXN,
    ):
        queries_GD = cuda.shared.array(query_shape, np.float32)
        tile_keys = cuda.shared.array(key_shape, np.float32)
        weights_GJ = cuda.shared.array(weight_shape, np.float32)
        maxima_G = cuda.shared.array(group_size, np.float32)
        totals_G = cuda.shared.array(group_size, np.float32)
        decays_G = cuda.shared.array(group_size, np.float32)
        sums = cuda.local.array((num_i, num_k), np.float32)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        row, kv_head, part = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        first_head, run, position = kv_head * group_size, runs_T[row], positions_T[row]
        start, end = part * split, min((part + 1) * split, position + 1)
        if window > 0:
            start = max(start, position + 1 - window)

        for g in range(y, group_size, num_y):
            for d in range(x, head_dim, num_x):
                queries_GD[g, d] = load(q_TND[row, first_head + g, d]) * scale
            if x == 0:
                maxima_G[g], totals_G[g] = -np.float32(np.inf), np.float32(0.0)
        for i in range(num_i):
            for k in range(num_k):
                sums[i, k] = np.float32(0.0)

        for tile in range(start // TILE * TILE, end, TILE):
            cuda.syncthreads()
            for j in range(y, TILE, num_y):
                if start <= tile + j < end:
                    block = block_tables_RC[run, (tile + j) // block_size]
                    for d in range(x, head_dim, num_x):
                        key = keys_BPKD[block, (tile + j) % block_size, kv_head, d]
                        tile_keys[j, d] = load(key)
            cuda.syncthreads()
            score_tile(queries_GD, tile_keys, tile, start, end, weights_GJ)
            cuda.syncthreads()
            soften_tile(weights_GJ, maxima_G, totals_G, decays_G)
            cuda.syncthreads()
            for i in range(num_i):
                decay = decays_G[min(y + i * num_y, group_size - 1)]
                for k in range(num_k):
                    sums[i, k] *= decay
            for j in range(max(start - tile, 0), min(end - tile, TILE)):
                block = block_tables_RC[run, (tile + j) // block_size]
                for k in range(num_k):
                    d = min(x + k * num_x, head_dim - 1)
                    value = load(values_BPKD[block, (tile + j) % block_size, kv_head, d])
                    for i in range(num_i):
                        sums[i, k] += weights_GJ[min(y + i * num_y, group_size - 1), j] * value

        cuda.syncthreads()
        for i in range(num_i):
            for k in range(num_k):
                g, d = y + i * num_y, x + k * num_x
                # Threads past the last head or element have computed a copy of the last one.
                if g < group_size and d < head_dim:
                    sums_TXND[row, part, first_head + g, d] = sums[i, k]
        for g in range(y, group_size, num_y):
            if x == 0:
                maxima_TXN[row, part, first_head + g] = maxima_G[g]
                totals_TXN[row, part, first_head + g] = totals_G[g]

    return kernel


@functools.cache
def merge_kernel(number_format: str) -> Any:
    _, store = number_format_of(number_format)

    @cuda.jit
    def kernel(sums_TXND, maxima_TXN, totals_TXN, out_TND):
        row, n = cuda.blockIdx.x, cuda.blockIdx.y
        largest = -np.float32(np.inf)
        for x in range(maxima_TXN.shape[1]):
            largest = max(largest, maxima_TXN[row, x, n])
        for d in range(cuda.threadIdx.x, sums_TXND.shape[3], cuda.blockDim.x):
            value_sum, total = np.float32(0.0), np.float32(0.0)
            for x in range(maxima_TXN.shape[1]):
                # A split without positions has a maximum of -inf and weighs nothing.
                share = np.float32(math.exp(maxima_TXN[row, x, n] - largest))
                value_sum += share * sums_TXND[row, x, n, d]
                total += share * totals_TXN[row, x, n]
            out_TND[row, n, d] = store(value_sum / total)

    return kernel


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)
