"""Gated SiLU on the CPU."""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from core.kernels.arithmetic import PANEL_COLUMNS
from core.kernels.compile import kernel
from core.kernels.exponential import exponential
from core.kernels.inputs import store_input_group
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    add,
    divide,
    load_floats,
    multiply,
    splat,
    subtract,
)


@kernel
def silu_multiply_panel(arithmetic, gate_up, num_rows, out, out_stride):
    """SiLU(gate) x up for one pair of panels, as inputs of a product.

    By address: `gate_up` is float32 [T, 128], 64 columns of gate and the 64 of up that belong
    to them; row t of the result goes to `out` + t x `out_stride` bytes.
    """
    for t in range(num_rows):
        row = gate_up + t * 2 * PANEL_COLUMNS * 4
        store_input_group(
            arithmetic,
            out + t * out_stride,
            silu_multiply_vector(row),
            silu_multiply_vector(row + BYTES_OF_FLOATS),
            silu_multiply_vector(row + 2 * BYTES_OF_FLOATS),
            silu_multiply_vector(row + 3 * BYTES_OF_FLOATS),
        )


@kernel
def silu_multiply_vector(where):
    """SiLU(gate) x up for the 16 columns of gate at `where` and those of up a panel behind."""
    one, zero = splat(np.float32(1.0)), splat(np.float32(0.0))
    gate, up = load_floats(where), load_floats(where + PANEL_COLUMNS * 4)
    silu = divide(gate, add(one, exponential(subtract(zero, gate))))
    return multiply(silu, up)
