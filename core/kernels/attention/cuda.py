"""Paged attention on CUDA: one block per (row, KV head, split of the positions).

Softmax is computed online (Milakov and Gimelshein 2018) over tiles of positions; splits
of SPLIT positions run side by side and are merged in order (the "flash-decoding" of Dao et
al. 2023). Tiles and splits are cut by position, never by load, so a row's result depends on
nothing else in the batch. A tile of keys and values is read once for all query heads of the
group, in words of eight bytes, neighbours by neighbouring threads.

Letters as in `reference`, and S slots, M blocks of the longest sequence, X splits, W words of a
head, J positions in a tile, G = N / K query heads a KV head, A parts of a score. Queries are
float32; keys and values come as int64 words of the number format, outputs are in it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from core.kernels.cuda_launch import Launch, ceil_div
from core.kernels.cuda_numbers import number_format_of

# Along words of a head, and along heads.
THREADS = (32, 8)
MERGE_THREADS = 64
SPLIT = 64
# A score is summed in so many parts, by as many threads: whatever their number really is.
PARTS = 4
LONGEST_TILE = 64
# What every device gives a block without being asked.
SHARED_BYTES = 48 * 1024


class Partials(NamedTuple):
    """Float32 results of the splits: sums not yet divided, maxima and sums of the softmax."""

    sums_TXND: Any
    maxima_TXN: Any
    totals_TXN: Any


def num_splits(longest: int, *, split: int = SPLIT) -> int:
    """Splits that sequences of up to `longest` positions need."""
    return ceil_div(longest, split)


def paged_attention(
    q_TND: Any,
    keys_BPKW: Any,
    values_BPKW: Any,
    *,
    block_tables_SM: Any,
    slots_T: Any,
    positions_T: Any,
    window: int | None,
    partials: Partials,
    out_TND: Any,
    number_format: str,
    launch: Launch,
    split: int = SPLIT,
) -> None:
    """Attends from every row; row t is at `positions_T[t]` of the sequence in `slots_T[t]`.

    `partials` has as many splits as the longest sequence needs, or more. Rows at negative
    positions are padding, and become zero.
    """
    num_rows, num_heads, head_dim = q_TND.shape
    _, block_size, num_kv_heads, num_words = keys_BPKW.shape
    threads = launch.threads_xy(THREADS)
    attend = attend_kernel(
        number_format,
        head_dim=head_dim,
        num_words=num_words,
        group_size=num_heads // num_kv_heads,
        block_size=block_size,
        threads=threads,
        split=split,
    )
    grid = (num_rows, num_kv_heads, partials.maxima_TXN.shape[1])
    attend[grid, threads, launch.stream](
        q_TND,
        keys_BPKW,
        values_BPKW,
        block_tables_SM,
        slots_T,
        positions_T,
        np.int32(window or 0),
        *partials,
    )
    merge = merge_kernel(number_format, split)
    merge[(num_rows, num_heads), launch.threads(MERGE_THREADS), launch.stream](
        positions_T, *partials, out_TND
    )


def tile_size_of(num_words: int, group_size: int, per_word: int) -> int:
    """The longest tile, of a power of two, whose keys, values and scores fit beside the queries."""
    size = LONGEST_TILE
    while size > 1 and _shared_bytes(size, num_words, group_size, per_word) > SHARED_BYTES:
        size //= 2
    return size


def _shared_bytes(tile_size: int, num_words: int, group_size: int, per_word: int) -> int:
    words = tile_size * (2 * num_words + 1)
    floats = group_size * (tile_size * (PARTS + 2) + num_words * per_word + 3)
    return 8 * words + 4 * floats


@functools.cache
def attend_kernel(
    number_format: str,
    *,
    head_dim: int,
    num_words: int,
    group_size: int,
    block_size: int,
    threads: tuple[int, int],
    split: int,
) -> Any:
    unpack, per_word = number_format_of(number_format)[2:]
    num_x, num_y = threads
    num_threads = num_x * num_y
    # A tile lies within a split, so that it never is without any position to attend to.
    tile_size = min(split, tile_size_of(num_words, group_size, per_word))
    width, part_words = num_words * per_word, ceil_div(num_words, PARTS)
    # One word more than needed: the threads of a score step then read different banks.
    key_shape, value_shape = (tile_size, num_words + 1), (tile_size, num_words)
    part_shape, weight_shape = (PARTS, group_size, tile_size), (group_size, tile_size)
    query_shape = (group_size, width)
    # Loops over these have a fixed number of turns, so that sums stay in registers, and that all
    # loads of a thread are under way before the first one is waited for.
    num_i, num_k = ceil_div(group_size, num_y), ceil_div(num_words, num_x)
    num_loads = ceil_div(tile_size * num_words, num_threads)
    sum_shape = (num_i, num_k * per_word)
    scale = np.float32(head_dim**-0.5)
    least = -np.float32(np.inf)

    @cuda.jit(device=True)
    def load_tiles(
        keys_BPKW,
        values_BPKW,
        block_tables_SM,
        slot,
        kv_head,
        tile,
        start,
        end,
        tile_keys,
        tile_values,
        thread,
    ):
        """Reads keys and values; positions outside of start and end become zero."""
        key_words = cuda.local.array(num_loads, np.int64)
        value_words = cuda.local.array(num_loads, np.int64)
        for turn in range(num_loads):
            item = thread + turn * num_threads
            j, w = item // num_words, item % num_words
            key_words[turn] = value_words[turn] = np.int64(0)
            if j < tile_size and start <= tile + j < end:
                block = block_tables_SM[slot, (tile + j) // block_size]
                place = (tile + j) % block_size
                key_words[turn] = keys_BPKW[block, place, kv_head, w]
                value_words[turn] = values_BPKW[block, place, kv_head, w]
        for turn in range(num_loads):
            item = thread + turn * num_threads
            j, w = item // num_words, item % num_words
            if j < tile_size:
                tile_keys[j, w] = key_words[turn]
                tile_values[j, w] = value_words[turn]

    @cuda.jit(device=True)
    def score_tile(queries_GD, tile_keys, scores_AGJ, thread):
        """Products of a quarter of every key with the queries of the group."""
        sums_G = cuda.local.array(group_size, np.float32)
        for item in range(thread, tile_size * PARTS, num_threads):
            j, part = item % tile_size, item // tile_size
            for g in range(group_size):
                sums_G[g] = np.float32(0.0)
            for at in range(part_words):
                w = part * part_words + at
                if w < num_words:
                    word = tile_keys[j, w]
                    for i in range(per_word):
                        key = unpack(word, i)
                        for g in range(group_size):
                            sums_G[g] += queries_GD[g, w * per_word + i] * key
            for g in range(group_size):
                scores_AGJ[part, g, j] = sums_G[g]

    @cuda.jit(device=True)
    def sum_scores(scores_AGJ, weights_GJ, tile, start, end, thread):
        """Whole scores; -inf outside of start and end."""
        for item in range(thread, group_size * tile_size, num_threads):
            g, j = item // tile_size, item % tile_size
            score = scores_AGJ[0, g, j]
            for part in range(1, PARTS):
                score += scores_AGJ[part, g, j]
            weights_GJ[g, j] = score if start <= tile + j < end else least

    @cuda.jit(device=True)
    def soften(weights_GJ, softened_GJ, maxima_G, new_maxima_G, decays_G, thread):
        """Weights below the new maxima, and how much older sums decay."""
        for item in range(thread, group_size * tile_size, num_threads):
            g, j = item // tile_size, item % tile_size
            largest = maxima_G[g]
            for other in range(tile_size):
                largest = max(largest, weights_GJ[g, other])
            softened_GJ[g, j] = np.float32(math.exp(weights_GJ[g, j] - largest))
            if j == 0:
                # At the first tile this is exp(-inf) = 0: there is nothing yet to decay.
                decays_G[g] = np.float32(math.exp(maxima_G[g] - largest))
                new_maxima_G[g] = largest

    @cuda.jit
    def kernel(
        q_TND,
        keys_BPKW,
        values_BPKW,
        block_tables_SM,
        slots_T,
        positions_T,
        window,
        sums_TXND,
        maxima_TXN,
        totals_TXN,
    ):
        queries_GD = cuda.shared.array(query_shape, np.float32)
        tile_keys = cuda.shared.array(key_shape, np.int64)
        tile_values = cuda.shared.array(value_shape, np.int64)
        scores_AGJ = cuda.shared.array(part_shape, np.float32)
        weights_GJ = cuda.shared.array(weight_shape, np.float32)
        softened_GJ = cuda.shared.array(weight_shape, np.float32)
        maxima_G = cuda.shared.array(group_size, np.float32)
        new_maxima_G = cuda.shared.array(group_size, np.float32)
        decays_G = cuda.shared.array(group_size, np.float32)
        sums = cuda.local.array(sum_shape, np.float32)
        totals = cuda.local.array(num_i, np.float32)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        thread = y * num_x + x
        row, kv_head, part = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z
        position = positions_T[row]
        if part * split > position:
            return  # `merge_kernel` does not look at such a split
        first_head, slot = kv_head * group_size, slots_T[row]
        start, end = part * split, min((part + 1) * split, position + 1)
        if window > 0:
            start = max(start, position + 1 - window)

        for i in range(num_i):
            g = y + i * num_y
            for k in range(num_k * per_word):
                d = x + k * num_x
                if g < group_size and d < width:
                    query = np.float32(0.0)
                    if d < head_dim:
                        query = q_TND[row, first_head + g, d] * scale
                    queries_GD[g, d] = query
            if x == 0 and g < group_size:
                maxima_G[g] = least
        for i in range(num_i):
            totals[i] = np.float32(0.0)
            for k in range(num_k * per_word):
                sums[i, k] = np.float32(0.0)

        for tile in range(start // tile_size * tile_size, end, tile_size):
            cuda.syncthreads()
            load_tiles(
                keys_BPKW,
                values_BPKW,
                block_tables_SM,
                slot,
                kv_head,
                tile,
                start,
                end,
                tile_keys,
                tile_values,
                thread,
            )
            cuda.syncthreads()
            score_tile(queries_GD, tile_keys, scores_AGJ, thread)
            cuda.syncthreads()
            sum_scores(scores_AGJ, weights_GJ, tile, start, end, thread)
            cuda.syncthreads()
            soften(weights_GJ, softened_GJ, maxima_G, new_maxima_G, decays_G, thread)
            cuda.syncthreads()
            for i in range(num_i):
                g = min(y + i * num_y, group_size - 1)
                totals[i] *= decays_G[g]
                for k in range(num_k * per_word):
                    sums[i, k] *= decays_G[g]
                if x == 0:
                    maxima_G[g] = new_maxima_G[g]
            for j in range(tile_size):
                for i in range(num_i):
                    weight = softened_GJ[min(y + i * num_y, group_size - 1), j]
                    totals[i] += weight
                    for k in range(num_k):
                        word = tile_values[j, min(x + k * num_x, num_words - 1)]
                        for e in range(per_word):
                            sums[i, k * per_word + e] += weight * unpack(word, e)

        for i in range(num_i):
            g = y + i * num_y
            # Threads past the last head or word have computed a copy of the last one.
            if g < group_size:
                for k in range(num_k):
                    for e in range(per_word):
                        d = (x + k * num_x) * per_word + e
                        if d < head_dim:
                            sums_TXND[row, part, first_head + g, d] = sums[i, k * per_word + e]
                if x == 0:
                    maxima_TXN[row, part, first_head + g] = maxima_G[g]
                    totals_TXN[row, part, first_head + g] = totals[i]

    return kernel


@functools.cache
def merge_kernel(number_format: str, split: int) -> Any:
    store = number_format_of(number_format).store

    @cuda.jit
    def kernel(positions_T, sums_TXND, maxima_TXN, totals_TXN, out_TND):
        row, n = cuda.blockIdx.x, cuda.blockIdx.y
        num_parts = (positions_T[row] + split) // split  # none at position -1
        largest = -np.float32(np.inf)
        for x in range(num_parts):
            largest = max(largest, maxima_TXN[row, x, n])
        for d in range(cuda.threadIdx.x, out_TND.shape[2], cuda.blockDim.x):
            value_sum, total = np.float32(0.0), np.float32(0.0)
            for x in range(num_parts):
                # A split before the window has a maximum of -inf and weighs nothing.
                share = np.float32(math.exp(maxima_TXN[row, x, n] - largest))
                value_sum += share * sums_TXND[row, x, n, d]
                total += share * totals_TXN[row, x, n]
            value = np.float32(0.0)
            if num_parts > 0:
                value = value_sum / total
            out_TND[row, n, d] = store(value)

    return kernel
