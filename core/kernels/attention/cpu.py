"""Paged attention on the CPU, for decode steps and prefill chunks alike.

Rows of one sequence at neighbouring positions share a tile: with the query heads of a
group they are multiplied together with each block of keys and values. A row's result
does not depend on its tile: scores, exponentials and sums of each row are computed by
themselves, blocks are walked in order of position, and positions that a row does not see
add exact zeros.

Letters: T rows, C columns of the q/k/v product, S slots, B blocks of a sequence.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.kernels.arithmetic import (
    LANES,
    MAX_TILE_ROWS,
    element_bytes,
    elements_per_word,
    input_bytes,
)
from core.kernels.compile import kernel
from core.kernels.exponential import exponential
from core.kernels.tiles import scores_tile, values_tile
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    add,
    address,
    largest_lane,
    load_floats,
    maximum,
    multiply,
    prefetch,
    splat,
    store_inputs,
    subtract,
    sum_of_lanes,
)

TILE_QUERIES = 12  # rows x heads of a group that share a pass over keys and values


class HeadSizes(NamedTuple):
    """Heads of one layer. `width` is head_dim rounded up to a multiple of 16."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    norms_heads: bool
    norm_eps: float
    scale: np.float32  # of the scores: head_dim ** -0.5


class RowTable(NamedTuple):
    """Where each row of a micro-batch belongs."""

    num_rows: int
    slots_T: npt.NDArray[np.int32]
    positions_T: npt.NDArray[np.int32]
    block_tables_SB: npt.NDArray[np.int32]


class AttentionWorkspace(NamedTuple):
    """Buffers for one tile. Q queries: the heads of a group times rows, at least TILE_QUERIES."""

    queries_QW: npt.NDArray[np.uint32]  # a head in the input format
    scores_QP: npt.NDArray[np.float32]  # P: positions of the longest sequence + 32
    weights_QP: npt.NDArray[np.uint32]  # P in the input format
    outputs_QD: npt.NDArray[np.float32]
    scales_Q: npt.NDArray[np.float32]


@kernel
def rows_of_tile(rows, first, most):
    """How many rows from `first` on follow each other in one sequence, at most `most`."""
    count = 1
    while (
        count < most
        and first + count < rows.num_rows
        and rows.slots_T[first + count] == rows.slots_T[first]
        and rows.positions_T[first + count] == rows.positions_T[first] + count
    ):
        count += 1
    return count


@kernel
def softmax_weights(arithmetic, scores, num_blocks, weights):
    """Writes exp(score - largest) as inputs of a product; returns 1 / their sum.

    By address. Minus infinity gives an exact 0.
    """
    largest = splat(np.float32(-np.inf))
    for block in range(num_blocks):
        largest = maximum(largest, load_floats(scores + block * BYTES_OF_FLOATS))
    largest = splat(largest_lane(largest))
    total = splat(np.float32(0.0))
    for block in range(num_blocks):
        floats = exponential(subtract(load_floats(scores + block * BYTES_OF_FLOATS), largest))
        total = add(total, floats)
        store_inputs(arithmetic, weights + block * LANES * input_bytes(arithmetic), floats)
    return np.float32(1.0) / sum_of_lanes(total)


@kernel
def load_queries(arithmetic, heads, qkv_TC, first_row, num_rows, kv_head, work):
    """Packs the queries of a tile, row by row, as inputs of a product."""
    group = heads.num_heads // heads.num_kv_heads
    target = address(work.queries_QW)
    stride = work.queries_QW.shape[1] * 4
    for i in range(num_rows):
        source = address(qkv_TC[first_row + i]) + kv_head * group * heads.width * 4
        for head in range(group):
            for vector in range(heads.width // LANES):
                floats = load_floats(source + (head * heads.width + vector * LANES) * 4)
                where = target + (i * group + head) * stride
                store_inputs(arithmetic, where + vector * LANES * input_bytes(arithmetic), floats)


@kernel
def score_blocks(arithmetic, num_queries, table_B, num_blocks, keys, block_stride, num_words, work):
    """Scores of a tile's queries with `num_blocks` blocks of keys, two blocks at a time."""
    queries, query_stride = address(work.queries_QW), work.queries_QW.shape[1] * 4
    scores, score_stride = address(work.scores_QP), work.scores_QP.shape[1] * 4
    for block in range(0, num_blocks, 2):
        keys_0 = keys + np.int64(table_B[block]) * block_stride
        keys_1 = keys_0
        if block + 1 < num_blocks:
            keys_1 = keys + np.int64(table_B[block + 1]) * block_stride
        for first in range(0, num_queries, MAX_TILE_ROWS):
            scores_tile(
                arithmetic,
                min(MAX_TILE_ROWS, num_queries - first),
                queries + first * query_stride,
                query_stride,
                keys_0,
                keys_1,
                num_words,
                scores + first * score_stride + block * BYTES_OF_FLOATS,
                score_stride,
            )


@kernel
def sum_values(arithmetic, num_queries, table_B, num_words, values, block_stride, width, work):
    """Sums of values weighted by the tile's weights, 64 elements at a time, then 16."""
    weights, weight_stride = address(work.weights_QP), work.weights_QP.shape[1] * 4
    outputs, output_stride = address(work.outputs_QD), work.outputs_QD.shape[1] * 4
    table = address(table_B)
    for first in range(0, num_queries, MAX_TILE_ROWS):
        count = min(MAX_TILE_ROWS, num_queries - first)
        element = 0
        while element < width:
            rows = weights + first * weight_stride
            source = values + element * 4
            target = outputs + first * output_stride + element * 4
            if width - element >= 4 * LANES:
                values_tile(
                    arithmetic, count, 4, rows, weight_stride, table, num_words, source,
                    block_stride, width * 4, target, output_stride,
                )  # fmt: skip
                element += 4 * LANES
            else:
                values_tile(
                    arithmetic, count, 1, rows, weight_stride, table, num_words, source,
                    block_stride, width * 4, target, output_stride,
                )  # fmt: skip
                element += LANES


@kernel
def weigh_positions(
    arithmetic, group, num_rows, first_position, first_block, num_blocks, window, work
):
    """Hides from each row what it must not see, and turns its scores into weights."""
    minus_infinity = np.float32(-np.inf)
    base = first_block * LANES
    for query in range(num_rows * group):
        position = first_position + query // group
        for p in range(position + 1, base + num_blocks * LANES):
            work.scores_QP[query, p - base] = minus_infinity
        for p in range(base, position + 1 - window):
            work.scores_QP[query, p - base] = minus_infinity
        work.scales_Q[query] = softmax_weights(
            arithmetic,
            address(work.scores_QP) + query * work.scores_QP.shape[1] * 4,
            num_blocks,
            address(work.weights_QP) + query * work.weights_QP.shape[1] * 4,
        )


@kernel
def store_outputs(arithmetic, heads, num_rows, kv_head, work, out, out_stride):
    """Divides by the sums of weights and stores as inputs of a product; `out`: the tile's rows."""
    group = heads.num_heads // heads.num_kv_heads
    for query in range(num_rows * group):
        scale = splat(work.scales_Q[query])
        source = address(work.outputs_QD) + query * work.outputs_QD.shape[1] * 4
        head = kv_head * group + query % group
        target = out + query // group * out_stride + head * heads.width * input_bytes(arithmetic)
        for vector in range(heads.width // LANES):
            floats = multiply(load_floats(source + vector * BYTES_OF_FLOATS), scale)
            store_inputs(arithmetic, target + vector * LANES * input_bytes(arithmetic), floats)


@kernel
def prefetch_blocks(rows, row, window, cache, block_stride, num_bytes):
    """Asks for the keys and values that row `row` will read, if its sequence begins there."""
    if row >= rows.num_rows or rows.slots_T[row] == rows.slots_T[row - 1]:
        return
    position = rows.positions_T[row]
    first = max(0, position + 1 - window) // LANES
    for block in range(first, position // LANES + 1):
        start = cache + np.int64(rows.block_tables_SB[rows.slots_T[row], block]) * block_stride
        for offset in range(0, num_bytes, 64):
            prefetch(start + offset)


@kernel
def attend(arithmetic, heads, rows, qkv_TC, cache, window, work, out, out_stride):
    """Attention of every row over its sequence's cached positions, its own included.

    Queries (rotated and scaled) are the first columns of `qkv_TC`; `cache` is the address of
    the layer's cache (layout: `core.kernels.rotary.cpu`), `out` that of the results as
    inputs of a product, heads side by side, `out_stride` bytes a row. A row sees `window`
    positions.
    """
    group = heads.num_heads // heads.num_kv_heads
    half_bytes = LANES * heads.width * element_bytes(arithmetic)
    block_stride = heads.num_kv_heads * 2 * half_bytes
    most_rows = max(1, TILE_QUERIES // group)
    row = 0
    while row < rows.num_rows:
        count = rows_of_tile(rows, row, most_rows)
        position = np.int64(rows.positions_T[row])
        first_block = max(0, position + 1 - window) // LANES
        num_blocks = (position + count - 1) // LANES + 1 - first_block
        num_positions = position + count - first_block * LANES
        per_word = elements_per_word(arithmetic)
        table_B = rows.block_tables_SB[rows.slots_T[row], first_block:]
        for kv_head in range(heads.num_kv_heads):
            keys = cache + kv_head * 2 * half_bytes
            prefetch_blocks(rows, row + count, window, keys, block_stride, 2 * half_bytes)
            load_queries(arithmetic, heads, qkv_TC, row, count, kv_head, work)
            num_queries = count * group
            score_blocks(
                arithmetic, num_queries, table_B, num_blocks, keys, block_stride,
                heads.width // per_word, work,
            )  # fmt: skip
            weigh_positions(
                arithmetic, group, count, position, first_block, num_blocks, window, work
            )
            sum_values(
                arithmetic, num_queries, table_B, (num_positions + per_word - 1) // per_word,
                keys + half_bytes, block_stride, heads.width, work,
            )  # fmt: skip
            store_outputs(
                arithmetic, heads, count, kv_head, work, out + row * out_stride, out_stride
            )
        row += count
