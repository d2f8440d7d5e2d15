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
    cache_scale_bytes,
    element_bytes,
    elements_per_word,
    input_bytes,
    unquantised,
)
from core.kernels.attention.operands import keys_of_block, load_queries, weigh_positions
from core.kernels.attention.tiles import scores_tile, values_tile
from core.kernels.compile import kernel
from core.kernels.elements import store_inputs
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    address,
    load_float,
    load_floats,
    multiply,
    splat,
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
    block_tables: int  # address of each slot's blocks (int32), in order of position
    table_bytes: int  # from slot to slot


class AttentionWorkspace(NamedTuple):
    """Buffers for one tile. Q queries: the heads of a group times rows, at least TILE_QUERIES."""

    queries_QW: npt.NDArray[np.uint32]  # a head in the input format
    scores_QP: npt.NDArray[np.float32]  # P: positions of the longest sequence + 32
    weights_QP: npt.NDArray[np.uint32]  # P in the input format
    outputs_QD: npt.NDArray[np.float32]
    scales_Q: npt.NDArray[np.float32]


class TileBuffers(NamedTuple):
    """Addresses of an `AttentionWorkspace` and bytes from query to query.

    Arrays would be counted in and out of every function that they are handed to: about 0.3 us a
    tile, where a row's attention over 100 positions takes 1 us.
    """

    queries: int
    query_stride: int
    scores: int
    score_stride: int
    weights: int
    weight_stride: int
    outputs: int
    output_stride: int
    scales: int


class Blocks(NamedTuple):
    """Keys and values of one KV head, as some rows see them."""

    table: int  # address of their numbers (int32), in order of position
    num_blocks: int
    first_block: int  # which block of the sequence is the first
    keys: int  # address of the cache's first keys of this head; the values lie behind
    block_stride: int  # bytes


@kernel
def half_bytes(arithmetic, width):
    """Bytes of the keys, or the values, of one head in a block."""
    return LANES * width * element_bytes(arithmetic) + cache_scale_bytes(arithmetic)


@kernel
def block_bytes(arithmetic, heads):
    """Bytes of the keys and values of all heads in a block of a layer."""
    return heads.num_kv_heads * 2 * half_bytes(arithmetic, heads.width)


@kernel
def score_blocks(arithmetic, num_queries, blocks, fetch_offset, num_words, buffers):
    """Scores of a tile's queries with blocks of keys, two at a time.

    Meanwhile what lies `fetch_offset` bytes behind the keys is fetched.
    """
    for block in range(0, blocks.num_blocks, 2):
        keys_0 = keys_of_block(blocks, block)
        keys_1 = keys_0
        if block + 1 < blocks.num_blocks:
            keys_1 = keys_of_block(blocks, block + 1)
        for first in range(0, num_queries, MAX_TILE_ROWS):
            scores_tile(
                arithmetic,
                min(MAX_TILE_ROWS, num_queries - first),
                buffers.queries + first * buffers.query_stride,
                buffers.query_stride,
                keys_0,
                keys_1,
                num_words,
                buffers.scores + first * buffers.score_stride + block * BYTES_OF_FLOATS,
                buffers.score_stride,
                keys_0 + fetch_offset,
                keys_1 + fetch_offset,
            )


@kernel
def sum_values(arithmetic, num_queries, blocks, ahead, num_positions, width, buffers):
    """Sums of values weighted by the tile's weights, 64 elements at a time, then 16.

    Meanwhile the keys of the blocks `ahead` are fetched.
    """
    values = blocks.keys + half_bytes(arithmetic, width)
    per_word = elements_per_word(arithmetic)
    num_words = (num_positions + per_word - 1) // per_word
    for first in range(0, num_queries, MAX_TILE_ROWS):
        count = min(MAX_TILE_ROWS, num_queries - first)
        rows = buffers.weights + first * buffers.weight_stride
        element = 0
        while element < width:
            offset = element * 4
            target = buffers.outputs + first * buffers.output_stride + offset
            if width - element >= 4 * LANES:
                values_tile(
                    arithmetic, count, 4, rows, buffers.weight_stride, blocks.table, num_words,
                    values + offset, blocks.block_stride, width * 4, target,
                    buffers.output_stride, ahead.table, ahead.keys + offset, ahead.num_blocks - 1,
                )  # fmt: skip
                element += 4 * LANES
            else:
                values_tile(
                    arithmetic, count, 1, rows, buffers.weight_stride, blocks.table, num_words,
                    values + offset, blocks.block_stride, width * 4, target,
                    buffers.output_stride, ahead.table, ahead.keys + offset, ahead.num_blocks - 1,
                )  # fmt: skip
                element += LANES


@kernel
def store_outputs(arithmetic, heads, num_rows, buffers, out, out_stride):
    """Divides by the sums of weights and stores as inputs of a product.

    `out` is the address for the group's heads of the tile's first row.
    """
    group = heads.num_heads // heads.num_kv_heads
    for query in range(num_rows * group):
        scale = splat(load_float(buffers.scales + query * 4))
        source = buffers.outputs + query * buffers.output_stride
        head = query % group * heads.width * input_bytes(arithmetic)
        target = out + query // group * out_stride + head
        for vector in range(heads.width // LANES):
            floats = multiply(load_floats(source + vector * BYTES_OF_FLOATS), scale)
            store_inputs(arithmetic, target + vector * LANES * input_bytes(arithmetic), floats)


@kernel
def visible_blocks(table, position, num_rows, window, keys, block_stride):
    """The blocks that rows from a position on see; `table` is the address of their sequence's."""
    first_block = max(0, position + 1 - window) // LANES
    num_blocks = (position + num_rows - 1) // LANES + 1 - first_block
    return Blocks(table + first_block * 4, num_blocks, first_block, keys, block_stride)


@kernel
def first_blocks_of_run(rows, row, window, cache, block_stride):
    """The blocks that the row sees with its first head; those of the last row behind it."""
    row = min(row, rows.num_rows - 1)
    position = np.int64(rows.positions_T[row])
    table = table_of_row(rows, row)
    return visible_blocks(table, position, 1, window, cache, block_stride)


@kernel
def table_of_row(rows, row):
    """Address of the blocks of the row's sequence."""
    return rows.block_tables + rows.slots_T[row] * rows.table_bytes


@kernel
def rows_of_run(rows, first):
    """How many rows from `first` on follow each other in one sequence."""
    count = 1
    while (
        first + count < rows.num_rows
        and rows.slots_T[first + count] == rows.slots_T[first]
        and rows.positions_T[first + count] == rows.positions_T[first] + count
    ):
        count += 1
    return count


@kernel
def attend_tile(
    arithmetic, heads, position, num_rows, blocks, ahead, window, queries, query_stride, buffers,
    out, out_stride,
):  # fmt: skip
    """Attention of one group of heads of rows that share a tile, the first at `position`."""
    group = heads.num_heads // heads.num_kv_heads
    num_words = heads.width // elements_per_word(arithmetic)
    num_positions = position + num_rows - blocks.first_block * LANES
    size = half_bytes(arithmetic, heads.width)
    load_queries(arithmetic, heads, num_rows, queries, query_stride, buffers)
    score_blocks(arithmetic, num_rows * group, blocks, size, num_words, buffers)
    weigh_positions(
        arithmetic, group, num_rows, position, blocks, 2 * size - cache_scale_bytes(arithmetic),
        window, buffers,
    )  # fmt: skip
    sum_values(arithmetic, num_rows * group, blocks, ahead, num_positions, heads.width, buffers)
    store_outputs(unquantised(arithmetic), heads, num_rows, buffers, out, out_stride)


@kernel
def attend_run(
    arithmetic, heads, num_kv_heads, table, position, num_rows, following, window, queries,
    query_stride, buffers, out, out_stride,
):  # fmt: skip
    """Attention of neighbouring rows of one sequence, the first at `position`.

    Head by head, so that a head's keys and values stay in the second-level cache for all tiles.
    Scores fetch the values that are needed next, and values the keys: of the same tile, or
    at the last one those of the next head or the sequence `following`.
    """
    group = heads.num_heads // heads.num_kv_heads
    most_rows = max(1, TILE_QUERIES // group)
    head_bytes = 2 * half_bytes(arithmetic, heads.width)
    output_bytes = input_bytes(unquantised(arithmetic))
    cache, block_stride = following.keys, following.block_stride
    for kv_head in range(num_kv_heads):
        keys = cache + kv_head * head_bytes
        first_head = kv_head * group * heads.width
        for row in range(0, num_rows, most_rows):
            count = min(most_rows, num_rows - row)
            blocks = visible_blocks(table, position + row, count, window, keys, block_stride)
            ahead = blocks
            if row + count == num_rows:
                ahead = following
                if kv_head + 1 < num_kv_heads:
                    ahead = visible_blocks(
                        table, position, 1, window, keys + head_bytes, block_stride
                    )
            attend_tile(
                arithmetic, heads, position + row, count, blocks, ahead, window,
                queries + row * query_stride + first_head * 4, query_stride, buffers,
                out + row * out_stride + first_head * output_bytes, out_stride,
            )  # fmt: skip


@kernel
def attend(arithmetic, heads, mine, rows, qkv_TC, cache, window, work, out, out_stride):
    """Attention of every row over its sequence's cached positions, its own included.

    Of the KV heads from `mine.first` on and before `mine.end`, and the query heads that are theirs.

    Queries (rotated and scaled) are the first columns of `qkv_TC`; `cache` is the address of
    the layer's cache (layout: `core.kernels.rotary.cpu`), `out` that of the results as
    inputs of a product, heads side by side, `out_stride` bytes a row. A row sees `window`
    positions.
    """
    buffers = TileBuffers(
        address(work.queries_QW), work.queries_QW.shape[1] * 4,
        address(work.scores_QP), work.scores_QP.shape[1] * 4,
        address(work.weights_QP), work.weights_QP.shape[1] * 4,
        address(work.outputs_QD), work.outputs_QD.shape[1] * 4,
        address(work.scales_Q),
    )  # fmt: skip
    head_bytes = 2 * half_bytes(arithmetic, heads.width)
    block_stride = block_bytes(arithmetic, heads)
    query_stride = qkv_TC.shape[1] * 4
    first_element = mine.first * (heads.num_heads // heads.num_kv_heads) * heads.width
    queries = address(qkv_TC) + first_element * 4
    out += first_element * input_bytes(unquantised(arithmetic))
    cache += mine.first * head_bytes
    row = 0
    while row < rows.num_rows:
        count = rows_of_run(rows, row)
        attend_run(
            arithmetic, heads, mine.end - mine.first, table_of_row(rows, row),
            np.int64(rows.positions_T[row]), count,
            first_blocks_of_run(rows, row + count, window, cache, block_stride), window,
            queries + row * query_stride, query_stride, buffers,
            out + row * out_stride, out_stride,
        )  # fmt: skip
        row += count
