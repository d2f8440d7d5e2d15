"""Rotary embedding and the write of keys and values into the paged cache, on the CPU.

The cache of one layer is [blocks, KV heads, 2, words]: of each block and head first the
keys as [words of D][16 positions], then the values as [words of 16 positions][D] (see
`core.kernels.arithmetic` for words): both as the products of attention read them. Behind either
of int8 lie 16 float32 scales, one for each position; keys have 128 added.

Letters: T rows, C columns of the q/k/v product, D elements in a head (padded to 16).
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from core.kernels.arithmetic import LANES, element_bytes, elements_per_word, is_integer
from core.kernels.attention.cpu import half_bytes, table_of_row
from core.kernels.byte_vectors import inverse_of, merge_bytes_of, scale_of, store_bytes_of
from core.kernels.compile import kernel
from core.kernels.elements import merge_elements, store_elements
from core.kernels.inputs import largest_magnitude
from core.kernels.norm.cpu import norm_head
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    address,
    load_floats,
    load_word,
    multiply,
    splat,
    store_float,
    store_word,
)

_MOST = np.float32(127.0)  # the largest integer of a key or value of 8 bits
_ADDS_128 = np.uint32(0x80808080)  # to each byte of a word


@kernel
def rotate_heads(row_C, first, num_heads, width, half, cos_F, sin_F, scale):
    """Rotates `num_heads` heads of a row in place, each `width` apart, and scales them."""
    for head in range(num_heads):
        start = first + head * width
        for i in range(half):
            a, b = row_C[start + i], row_C[start + half + i]
            row_C[start + i] = (a * cos_F[i] - b * sin_F[i]) * scale
            row_C[start + half + i] = (b * cos_F[i] + a * sin_F[i]) * scale


@kernel
def write_key(arithmetic, head, num_vectors, keys, position, scratch):
    """Writes one head's key (float32 at `head`) as column `position` of a block; by address."""
    inverse = splat(np.float32(1.0))
    flips = np.uint32(0)
    if is_integer(arithmetic):
        magnitude = largest_magnitude(head, num_vectors)
        inverse = splat(inverse_of(magnitude, _MOST))
        flips = _ADDS_128
        scales = keys + num_vectors * LANES * LANES
        store_float(scales + position * 4, scale_of(magnitude, _MOST))
    for vector in range(num_vectors):
        where = scratch + vector * LANES * element_bytes(arithmetic)
        floats = load_floats(head + vector * BYTES_OF_FLOATS)
        if is_integer(arithmetic):
            store_bytes_of(where, multiply(floats, inverse))
        else:
            store_elements(arithmetic, where, floats)
    for word in range(num_vectors * LANES // elements_per_word(arithmetic)):
        store_word(keys + (word * LANES + position) * 4, load_word(scratch + word * 4) ^ flips)


@kernel
def write_value(arithmetic, head, num_vectors, values, position):
    """Writes one head's value (float32 at `head`) as row `position` of a block; by address."""
    row = position // elements_per_word(arithmetic)
    part = position % elements_per_word(arithmetic)
    inverse = splat(np.float32(1.0))
    if is_integer(arithmetic):
        magnitude = largest_magnitude(head, num_vectors)
        inverse = splat(inverse_of(magnitude, _MOST))
        scales = values + num_vectors * LANES * LANES
        store_float(scales + position * 4, scale_of(magnitude, _MOST))
    for vector in range(num_vectors):
        where = values + (row * num_vectors + vector) * BYTES_OF_FLOATS
        floats = load_floats(head + vector * BYTES_OF_FLOATS)
        if is_integer(arithmetic):
            merge_bytes_of(where, multiply(floats, inverse), part)
        else:
            merge_elements(arithmetic, where, floats, part)


@kernel
def rotate_and_write(
    arithmetic, heads, mine, rows, qkv_TC, cos_LF, sin_LF, norms, cache, scratch
):  # fmt: skip
    """Norms (where `heads.norms_heads`), rotates and scales q in place, and writes k and v.

    Of the KV heads from `mine.first` on and before `mine.end`, and the query heads that are theirs.
    `heads` is a HeadSizes, `rows` a RowTable, `norms` the address of q's and k's norm
    weights, `cache` that of this layer's cache, `scratch` of room for one head in words.
    """
    num_vectors = heads.width // LANES
    half = heads.head_dim // 2
    first_key = heads.num_heads * heads.width
    first_value = first_key + heads.num_kv_heads * heads.width
    group = heads.num_heads // heads.num_kv_heads
    first_query, num_kv_heads = mine.first * group * heads.width, mine.end - mine.first
    first_own_key = first_key + mine.first * heads.width
    size = half_bytes(arithmetic, heads.width)
    for t in range(rows.num_rows):
        row = address(qkv_TC[t])
        position = rows.positions_T[t]
        cos_F, sin_F = cos_LF[position], sin_LF[position]
        if heads.norms_heads:
            for head in range(mine.first * group, mine.end * group):
                where = row + head * heads.width * 4
                norm_head(where, num_vectors, heads.head_dim, norms, heads.norm_eps)
            for head in range(mine.first, mine.end):
                where, weight = row + (first_key + head * heads.width) * 4, norms + heads.width * 4
                norm_head(where, num_vectors, heads.head_dim, weight, heads.norm_eps)
        rotate_heads(
            qkv_TC[t], first_query, num_kv_heads * group, heads.width, half, cos_F, sin_F,
            heads.scale,
        )  # fmt: skip
        one = np.float32(1.0)
        rotate_heads(qkv_TC[t], first_own_key, num_kv_heads, heads.width, half, cos_F, sin_F, one)
        block = np.int64(load_word(table_of_row(rows, t) + position // LANES * 4))
        for head in range(mine.first, mine.end):
            keys = cache + (block * heads.num_kv_heads + head) * 2 * size
            key = row + (first_key + head * heads.width) * 4
            write_key(arithmetic, key, num_vectors, keys, position % LANES, scratch)
            value = row + (first_value + head * heads.width) * 4
            write_value(arithmetic, value, num_vectors, keys + size, position % LANES)
