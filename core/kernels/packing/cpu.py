"""Packing on the CPU: rows of embeddings, frames and sampled positions, gathered and converted.

Letters: T rows, S rows elsewhere, V vocabulary, G = hidden size rounded up to a multiple of 64.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from core.kernels.arithmetic import LANES, element_bytes
from core.kernels.compile import kernel
from core.kernels.elements import load_elements, store_elements
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    address,
    load_floats,
    store_floats,
)


@kernel
def widen_row(arithmetic, source, num_vectors, target):
    """16 x num_vectors elements of the number format become float32; by address."""
    for vector in range(num_vectors):
        where = source + vector * LANES * element_bytes(arithmetic)
        store_floats(target + vector * BYTES_OF_FLOATS, load_elements(arithmetic, where))


@kernel
def gather_widened_rows(arithmetic, source_SG, row_indices_T, num_rows, target_TG):
    """Row t of the float32 target is row `row_indices_T[t]` of the source, widened."""
    num_vectors = target_TG.shape[1] // LANES
    for t in range(num_rows):
        source = address(source_SG[row_indices_T[t]])
        widen_row(arithmetic, source, num_vectors, address(target_TG[t]))


@kernel
def widen_rows(arithmetic, source_TG, num_rows, target_TG):
    """Rows in the number format become float32 rows."""
    num_vectors = target_TG.shape[1] // LANES
    for t in range(num_rows):
        widen_row(arithmetic, address(source_TG[t]), num_vectors, address(target_TG[t]))


@kernel
def narrow_rows(arithmetic, source_TG, num_rows, target_TG):
    """Float32 rows are rounded to the number format."""
    for t in range(num_rows):
        source, target = address(source_TG[t]), address(target_TG[t])
        for vector in range(source_TG.shape[1] // LANES):
            floats = load_floats(source + vector * BYTES_OF_FLOATS)
            store_elements(arithmetic, target + vector * LANES * element_bytes(arithmetic), floats)


@kernel
def gather_rows(source_SG, row_indices_T, num_rows, target_TG):
    """Row t of the float32 target is row `row_indices_T[t]` of the float32 source."""
    for t in range(num_rows):
        source, target = address(source_SG[row_indices_T[t]]), address(target_TG[t])
        for vector in range(target_TG.shape[1] // LANES):
            offset = vector * BYTES_OF_FLOATS
            store_floats(target + offset, load_floats(source + offset))


@kernel
def scatter_rows(source_TG, row_indices_T, num_rows, target_SG):
    """Float32 row t of the source is written to row `row_indices_T[t]` of the target."""
    for t in range(num_rows):
        source, target = address(source_TG[t]), address(target_SG[row_indices_T[t]])
        for vector in range(source_TG.shape[1] // LANES):
            offset = vector * BYTES_OF_FLOATS
            store_floats(target + offset, load_floats(source + offset))
