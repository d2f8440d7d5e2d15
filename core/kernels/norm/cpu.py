"""Root-mean-square norm on the CPU, fused with the rounding of the residual stream.

Letters: T rows, H elements in a row, G = H rounded up to a multiple of 64.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from core.kernels.arithmetic import GROUP, LANES, input_group_bytes
from core.kernels.compile import kernel
from core.kernels.elements import round_elements
from core.kernels.inputs import input_row_bytes, store_input_group
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    address,
    fused_multiply_add,
    load_floats,
    multiply,
    splat,
    store_floats,
    sum_of_lanes,
)


@kernel
def inverse_rms(row, num_vectors, size, eps):
    """1 / sqrt(mean of squares + eps) over the first `size` of 16 x num_vectors floats.

    `row` is an address; elements beyond `size` must be zero.
    """
    squares = splat(np.float32(0.0))
    for vector in range(num_vectors):
        floats = load_floats(row + vector * BYTES_OF_FLOATS)
        squares = fused_multiply_add(floats, floats, squares)
    mean = sum_of_lanes(squares) / np.float32(size)
    return np.float32(1.0) / np.sqrt(mean + np.float32(eps))


@kernel
def norm_rows(arithmetic, hidden_TG, num_rows, size, weight_G, eps, rounds, out):
    """Writes the normed rows, as inputs of a product, to the address `out`.

    Where `rounds`, every row of `hidden_TG` (float32) is first rounded in place to what the
    wire can carry: so a cut of the model at this place changes nothing.
    """
    num_vectors = hidden_TG.shape[1] // LANES
    hidden, weight = address(hidden_TG), address(weight_G)
    for t in range(num_rows):
        row = hidden + t * num_vectors * BYTES_OF_FLOATS
        target = out + t * input_row_bytes(arithmetic, hidden_TG.shape[1])
        if rounds:
            round_row(arithmetic, row, num_vectors)
        scale = splat(inverse_rms(row, num_vectors, size, eps))
        for group in range(hidden_TG.shape[1] // GROUP):
            offset = group * GROUP * 4
            store_input_group(
                arithmetic,
                target + group * input_group_bytes(arithmetic),
                normed_vector(row + offset, weight + offset, scale),
                normed_vector(row + offset + 64, weight + offset + 64, scale),
                normed_vector(row + offset + 128, weight + offset + 128, scale),
                normed_vector(row + offset + 192, weight + offset + 192, scale),
            )


@kernel
def normed_vector(floats, weight, scale):
    """16 floats times a scale times their weights; by address."""
    return multiply(multiply(load_floats(floats), scale), load_floats(weight))


@kernel
def round_row(arithmetic, row, num_vectors):
    """Rounds 16 x num_vectors floats at the address `row`, in place, to the number format."""
    for vector in range(num_vectors):
        where = row + vector * BYTES_OF_FLOATS
        store_floats(where, round_elements(arithmetic, load_floats(where)))


@kernel
def norm_head(head, num_vectors, size, weight, eps):
    """Norms one head of q or k in place; `head` and `weight` are addresses of float32."""
    scale = splat(inverse_rms(head, num_vectors, size, eps))
    for vector in range(num_vectors):
        where = head + vector * BYTES_OF_FLOATS
        store_floats(where, normed_vector(where, weight + vector * BYTES_OF_FLOATS, scale))
