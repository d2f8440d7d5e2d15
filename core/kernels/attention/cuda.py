"""Paged attention on CUDA: one block per (row, some heads of a KV head, split of the positions).

Splits of SPLIT positions run side by side, each with a softmax of its own, and are merged in order
(the "flash-decoding" of Dao et al. 2023). Splits are cut by position, never by load, so a row's
result depends on nothing else in the batch. A split's keys and values are all asked for before the
first of them is waited for, in words of eight bytes, neighbours by neighbouring threads; each is
used for all heads of the block from registers.

Letters as in `reference`, and S slots, M blocks of the longest sequence, X splits, W words of a
head, J positions in a split, G query heads of a block, A lanes that share a key, Y threads that
share a word of the values. Queries are float32; keys and values come as int64 words of the number
format, outputs are in it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="attr-defined"

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from core.kernels.attention.cuda_shape import MOST_WORDS, THREADS, WARP, block_shape
from core.kernels.cuda_launch import Launch, ceil_div
from core.kernels.cuda_numbers import number_format_of

MERGE_THREADS = 64
SPLIT = 64
# The largest score of a head is found by so many threads.
MAX_SHARES = 8


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
    positions are padding, and become zero. Sizes of blocks and splits are powers of two.
    """
    num_rows, num_heads, head_dim = q_TND.shape
    _, block_size, num_kv_heads, num_words = keys_BPKW.shape
    group_size = num_heads // num_kv_heads
    threads = launch.threads(THREADS)
    attend = attend_kernel(
        number_format,
        head_dim=head_dim,
        num_words=num_words,
        group_size=group_size,
        block_size=block_size,
        num_threads=threads,
        split=split,
    )
    heads = block_shape(num_words, group_size, number_format, num_threads=threads).heads
    grid = (num_rows, num_kv_heads * ceil_div(group_size, heads), partials.maxima_TXN.shape[1])
    # Flat, since an index along each axis costs a kernel more than what is done with the element.
    attend[grid, threads, launch.stream](
        q_TND.reshape(-1),
        keys_BPKW.reshape(-1),
        values_BPKW.reshape(-1),
        block_tables_SM,
        slots_T,
        positions_T,
        np.int32(window or 0),
        partials.sums_TXND.reshape(-1),
        partials.maxima_TXN,
        partials.totals_TXN,
    )
    merge = merge_kernel(number_format, split)
    merge[(num_rows, num_heads), launch.threads(MERGE_THREADS), launch.stream](
        positions_T, *partials, out_TND
    )


@functools.cache
def attend_kernel(
    number_format: str,
    *,
    head_dim: int,
    num_words: int,
    group_size: int,
    block_size: int,
    num_threads: int,
    split: int,
) -> Any:
    unpack, per_word = number_format_of(number_format)[2:]
    heads, lanes, columns = block_shape(
        num_words, group_size, number_format, num_threads=num_threads
    )
    num_chunks, is_even = ceil_div(group_size, heads), group_size % heads == 0
    # Loops over these have a fixed number of turns, so that what they count stays in registers.
    lane_words, column_words = ceil_div(num_words, lanes), ceil_div(num_words, columns)
    places, shares = num_threads // lanes, num_threads // columns
    key_turns = min(ceil_div(split, places), max(1, MOST_WORDS // lane_words))
    key_rounds = ceil_div(split, places * key_turns)
    share = ceil_div(split, shares)
    value_turns = min(share, max(1, MOST_WORDS // column_words))
    value_rounds = ceil_div(share, value_turns)
    # A thread's values follow each other: this many lie in one block of the cache.
    stride = math.gcd(math.gcd(share, value_turns), block_size)
    lane_bits, column_bits, block_bits, split_bits = (
        size.bit_length() - 1 for size in (lanes, columns, block_size, split)
    )
    width, item_turns = num_words * per_word, ceil_div(heads * split, num_threads)
    output_turns = ceil_div(heads * head_dim, num_threads)
    query_shape = (heads, lane_words * per_word)
    sum_shape = (heads, column_words * per_word)
    # Padded so that the lanes of a key, and keys side by side, write to different banks.
    part_size = heads * split + WARP // lanes
    max_turns = ceil_div(split, MAX_SHARES)
    num_parts, num_scores, num_maxima = lanes * part_size, heads * split, heads * MAX_SHARES
    num_sums, num_totals = shares * heads * width, shares * heads
    scale = np.float32(head_dim**-0.5)
    least = -np.float32(np.inf)

    @cuda.jit(device=True)
    def first_word(table_M, position, kv_head, num_kv_heads):
        """Where in the flat cache a head begins at a position of the table's sequence."""
        block = np.int64(table_M[np.uint64(position >> block_bits)])
        row = (block << block_bits) + (position & (block_size - 1))
        return (row * num_kv_heads + kv_head) * num_words

    @cuda.jit(device=True)
    def load_keys(keys, table_M, begin, start, end, kv_head, num_kv_heads, first, lane, key_words):
        """A thread's words of every `places`-th key from position `first` on; zero outside."""
        for turn in range(key_turns):
            j = first + turn * places
            for i in range(lane_words):
                key_words[turn, i] = np.int64(0)
            if start <= j < end:
                at = first_word(table_M, begin + j, kv_head, num_kv_heads) + lane
                for i in range(lane_words):
                    if i * lanes + lane < num_words:
                        key_words[turn, i] = keys[np.uint64(at + i * lanes)]

    @cuda.jit(device=True)
    def load_values(
        values, table_M, begin, start, end, kv_head, num_kv_heads, first, column, value_words
    ):
        """A thread's words of the values from position `first` on; zero outside."""
        at = np.int64(0)
        for turn in range(value_turns):
            j = first + turn
            if turn % stride == 0 and j < end:
                at = first_word(table_M, begin + j, kv_head, num_kv_heads) + column
            for i in range(column_words):
                value_words[turn, i] = np.int64(0)
                if start <= j < end and i * columns + column < num_words:
                    value_words[turn, i] = values[np.uint64(at + i * columns)]
            at += num_kv_heads * num_words

    @cuda.jit
    def kernel(
        queries,
        keys,
        values,
        block_tables_SM,
        slots_T,
        positions_T,
        window,
        partial_sums,
        maxima_TXN,
        totals_TXN,
    ):
        parts_AGJ = cuda.shared.array(num_parts, np.float32)
        scores_GJ = cuda.shared.array(num_scores, np.float32)
        maxima_GX = cuda.shared.array(num_maxima, np.float32)
        sums_YGD = cuda.shared.array(num_sums, np.float32)
        totals_YG = cuda.shared.array(num_totals, np.float32)
        key_words = cuda.local.array((key_turns, lane_words), np.int64)
        value_words = cuda.local.array((value_turns, column_words), np.int64)
        my_queries = cuda.local.array(query_shape, np.float32)
        products = cuda.local.array(heads, np.float32)
        sums = cuda.local.array(sum_shape, np.float32)
        totals = cuda.local.array(heads, np.float32)

        thread = cuda.threadIdx.x
        row, part = cuda.blockIdx.x, cuda.blockIdx.z
        kv_head, chunk = cuda.blockIdx.y // num_chunks, cuda.blockIdx.y % num_chunks
        num_kv_heads = cuda.gridDim.y // num_chunks
        position = positions_T[row]
        begin = part * split
        if begin > position:
            return  # `merge_kernel` does not look at such a split
        table_M = block_tables_SM[slots_T[row]]
        first_head = kv_head * group_size + chunk * heads
        num_heads = heads if is_even else min(heads, group_size - chunk * heads)
        # Of the split's positions.
        start, end = 0, min(split, position + 1 - begin)
        if window > 0:
            start = max(start, position + 1 - window - begin)
        lane, place = thread & (lanes - 1), thread >> lane_bits
        column, group = thread & (columns - 1), thread >> column_bits

        load_keys(keys, table_M, begin, start, end, kv_head, num_kv_heads, place, lane, key_words)
        first = group * share
        load_values(
            values, table_M, begin, start, end, kv_head, num_kv_heads, first, column, value_words
        )
        first_query = (row * num_kv_heads * group_size + first_head) * head_dim + lane * per_word
        for g in range(heads):
            for i in range(lane_words):
                for e in range(per_word):
                    query = np.float32(0.0)
                    if (i * lanes + lane) * per_word + e < head_dim and g < num_heads:
                        at = first_query + g * head_dim + i * lanes * per_word + e
                        query = queries[np.uint64(at)]
                    my_queries[g, i * per_word + e] = query

        for round in range(key_rounds):
            first = round * key_turns * places + place
            if round > 0:
                load_keys(
                    keys, table_M, begin, start, end, kv_head, num_kv_heads, first, lane, key_words
                )
            for turn in range(key_turns):
                j = first + turn * places
                if j < end:
                    for g in range(heads):
                        products[g] = np.float32(0.0)
                    for i in range(lane_words):
                        for e in range(per_word):
                            key = unpack(key_words[turn, i], e)
                            for g in range(heads):
                                products[g] += my_queries[g, i * per_word + e] * key
                    for g in range(heads):
                        parts_AGJ[np.uint64(lane * part_size + j + g * split)] = products[g]
        cuda.syncthreads()
        for turn in range(item_turns):
            item = thread + turn * num_threads
            if item < heads * split:
                j, score = item & (split - 1), least
                if start <= j < end:
                    score = parts_AGJ[np.uint64(item)]
                    for a in range(1, lanes):
                        score += parts_AGJ[np.uint64(item + a * part_size)]
                    score *= scale
                scores_GJ[np.uint64(item)] = score
        cuda.syncthreads()
        for item in range(thread, heads * MAX_SHARES, num_threads):
            largest, first = least, item // MAX_SHARES * split + item % MAX_SHARES
            for turn in range(max_turns):
                if turn * MAX_SHARES + item % MAX_SHARES < split:
                    largest = max(largest, scores_GJ[np.uint64(first + turn * MAX_SHARES)])
            maxima_GX[np.uint64(item)] = largest
        cuda.syncthreads()
        for turn in range(item_turns):
            item = thread + turn * num_threads
            if item < heads * split:
                g, j = item >> split_bits, item & (split - 1)
                largest = maxima_GX[np.uint64(g * MAX_SHARES)]
                for x in range(1, MAX_SHARES):
                    largest = max(largest, maxima_GX[np.uint64(g * MAX_SHARES + x)])
                weight = np.float32(0.0)
                if start <= j < end:
                    weight = np.float32(math.exp(scores_GJ[np.uint64(item)] - largest))
                scores_GJ[np.uint64(item)] = weight
                if j == 0 and g < num_heads:
                    maxima_TXN[row, part, first_head + g] = largest
        cuda.syncthreads()

        for g in range(heads):
            totals[g] = np.float32(0.0)
            for i in range(column_words * per_word):
                sums[g, i] = np.float32(0.0)
        for round in range(value_rounds):
            first = group * share + round * value_turns
            if round > 0:
                load_values(
                    values,
                    table_M,
                    begin,
                    start,
                    end,
                    kv_head,
                    num_kv_heads,
                    first,
                    column,
                    value_words,
                )
            if first < end:
                for turn in range(value_turns):
                    if round * value_turns + turn < share and first + turn < split:
                        for g in range(heads):
                            products[g] = scores_GJ[np.uint64(first + g * split + turn)]
                            totals[g] += products[g]
                        for i in range(column_words):
                            for e in range(per_word):
                                value = unpack(value_words[turn, i], e)
                                for g in range(heads):
                                    sums[g, i * per_word + e] += products[g] * value
        for g in range(heads):
            first = (group * heads + g) * width + column * per_word
            for i in range(column_words):
                if i * columns + column < num_words:
                    for e in range(per_word):
                        at = first + i * columns * per_word + e
                        sums_YGD[np.uint64(at)] = sums[g, i * per_word + e]
            if column == 0:
                totals_YG[np.uint64(group * heads + g)] = totals[g]
        cuda.syncthreads()
        first = (row * cuda.gridDim.z + part) * num_kv_heads * group_size + first_head
        for turn in range(output_turns):
            item = thread + turn * num_threads
            if item < num_heads * head_dim:
                at = item + item // head_dim * (width - head_dim)
                value_sum = sums_YGD[np.uint64(at)]
                for y in range(1, shares):
                    value_sum += sums_YGD[np.uint64(at + y * heads * width)]
                partial_sums[np.uint64(first * head_dim + item)] = value_sum
        if thread < num_heads:
            total = totals_YG[np.uint64(thread)]
            for y in range(1, shares):
                total += totals_YG[np.uint64(y * heads + thread)]
            totals_TXN[row, part, first_head + thread] = total

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
