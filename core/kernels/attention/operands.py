"""What attention multiplies keys and values with: queries, and the softmax of their scores.

Letters: see `core.kernels.attention.cpu`.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np

from core.kernels.arithmetic import (
    LANES,
    input_bytes,
    is_integer,
    weight_block_bytes,
)
from core.kernels.byte_vectors import (
    inverse_of,
    product_where_nonzero,
    scale_of,
    store_integers_of,
    whole,
)
from core.kernels.compile import kernel
from core.kernels.elements import store_inputs
from core.kernels.exponential import power_of_two
from core.kernels.inputs import largest_magnitude
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    add,
    fused_multiply_add,
    largest_lane,
    load_floats,
    load_word,
    maximum,
    multiply,
    splat,
    store_float,
    store_floats,
    store_word,
    sum_of_lanes,
)

LOG2_E = np.float32(math.log2(math.e))
_MOST_OF_QUERY, _MOST_OF_WEIGHT = np.float32(127.0), np.float32(255.0)  # integers


@kernel
def keys_of_block(blocks, index):
    """Address of the keys of a block, counted from the first that is seen."""
    number = np.int64(load_word(blocks.table + index * 4))
    return blocks.keys + number * blocks.block_stride


@kernel
def load_queries(arithmetic, heads, num_rows, queries, query_stride, buffers):
    """Packs the queries of a tile, row by row, as inputs of a product.

    By address: `queries` are a group's heads of the first row, `query_stride` bytes apart from row
    to row.
    """
    group = heads.num_heads // heads.num_kv_heads
    for i in range(num_rows):
        for head in range(group):
            source = queries + i * query_stride + head * heads.width * 4
            target = buffers.queries + (i * group + head) * buffers.query_stride
            if is_integer(arithmetic):
                store_query(arithmetic, source, heads.width // LANES, target)
                continue
            for vector in range(heads.width // LANES):
                floats = load_floats(source + vector * BYTES_OF_FLOATS)
                store_inputs(arithmetic, target + vector * LANES * input_bytes(arithmetic), floats)


@kernel
def store_query(arithmetic, source, num_vectors, target):
    """Writes a head of a query as signed integers; behind them its scale, and what corrects a sum
    with keys that have 128 added."""
    magnitude = largest_magnitude(source, num_vectors)
    inverse = splat(inverse_of(magnitude, _MOST_OF_QUERY))
    total = splat(np.float32(0.0))
    for vector in range(num_vectors):
        floats = multiply(load_floats(source + vector * BYTES_OF_FLOATS), inverse)
        store_integers_of(arithmetic, target + vector * LANES * input_bytes(arithmetic), floats)
        total = add(total, whole(floats))
    end = target + num_vectors * LANES * input_bytes(arithmetic)
    store_float(end, scale_of(magnitude, _MOST_OF_QUERY))
    store_word(end + 4, np.uint32(np.int64(np.float32(-128.0) * sum_of_lanes(total))))


@kernel
def weigh_positions(
    arithmetic, group, num_rows, first_position, blocks, value_scales, window, buffers
):
    """Hides from each row what it must not see, and turns its scores into weights."""
    minus_infinity = np.float32(-np.inf)
    base = blocks.first_block * LANES
    for query in range(num_rows * group):
        position = first_position + query // group
        scores = buffers.scores + query * buffers.score_stride
        for p in range(position + 1 - base, blocks.num_blocks * LANES):
            store_float(scores + p * 4, minus_infinity)
        for p in range(position + 1 - window - base):
            store_float(scores + p * 4, minus_infinity)
        weights = buffers.weights + query * buffers.weight_stride
        scale = softmax_weights(arithmetic, scores, blocks, value_scales, weights)
        store_float(buffers.scales + query * 4, scale)


@kernel
def softmax_weights(arithmetic, scores, blocks, value_scales, weights):
    """Writes exp(score - largest) as inputs of a product; returns 1 / their sum.

    By address; the scales of a block's values, if there are any, lie `value_scales` bytes behind
    its keys. Minus infinity gives an exact 0.
    """
    num_blocks = blocks.num_blocks
    # Two chains, since each step of one waits for the step before.
    largest = even = odd = splat(np.float32(-np.inf))
    for block in range(0, num_blocks - 1, 2):
        even = maximum(even, load_floats(scores + block * BYTES_OF_FLOATS))
        odd = maximum(odd, load_floats(scores + (block + 1) * BYTES_OF_FLOATS))
    if num_blocks % 2 == 1:
        largest = load_floats(scores + (num_blocks - 1) * BYTES_OF_FLOATS)
    scale = splat(LOG2_E)
    largest = splat(-LOG2_E * largest_lane(maximum(largest, maximum(even, odd))))
    total = splat(np.float32(0.0))
    for block in range(num_blocks):
        floats = load_floats(scores + block * BYTES_OF_FLOATS)
        floats = power_of_two(fused_multiply_add(floats, scale, largest))
        total = add(total, floats)
        where = weights + block * weight_block_bytes(arithmetic)
        if is_integer(arithmetic):
            scales = load_floats(keys_of_block(blocks, block) + value_scales)
            store_weights(arithmetic, scores + block * BYTES_OF_FLOATS, floats, scales, where)
        else:
            store_inputs(arithmetic, where, floats)
    return np.float32(1.0) / sum_of_lanes(total)


@kernel
def store_weights(arithmetic, scratch, floats, scales, where):
    """Writes a block's weights, times the scales of its values, as unsigned integers."""
    floats = product_where_nonzero(floats, scales)
    store_floats(scratch, floats)
    magnitude = largest_magnitude(scratch, 1)
    floats = multiply(floats, splat(inverse_of(magnitude, _MOST_OF_WEIGHT)))
    store_integers_of(arithmetic, where, floats)
    store_float(where + LANES * input_bytes(arithmetic), scale_of(magnitude, _MOST_OF_WEIGHT))
