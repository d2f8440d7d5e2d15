"""Gated SiLU on the CPU."""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from core.kernels.arithmetic import LANES, PANEL_COLUMNS, input_bytes
from core.kernels.compile import kernel
from core.kernels.exponential import exponential
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    add,
    divide,
    load_floats,
    multiply,
    splat,
    store_inputs,
    subtract,
)


@kernel
def silu_multiply_panel(arithmetic, gate_up, num_rows, out, out_stride):
    """SiLU(gate) x up for one pair of panels, as inputs of a product.

    By address: `gate_up` is float32 [T, 128], 64 columns of gate and the 64 of up that belong
    to them; row t of the result goes to `out` + t x `out_stride` bytes.
    """
    one, zero = splat(np.float32(1.0)), splat(np.float32(0.0))
    for t in range(num_rows):
        row = gate_up + t * 2 * PANEL_COLUMNS * 4
        target = out + t * out_stride
        for vector in range(PANEL_COLUMNS // LANES):
            gate = load_floats(row + vector * BYTES_OF_FLOATS)
            up = load_floats(row + PANEL_COLUMNS * 4 + vector * BYTES_OF_FLOATS)
            silu = divide(gate, add(one, exponential(subtract(zero, gate))))
            where = target + vector * LANES * input_bytes(arithmetic)
            store_inputs(arithmetic, where, multiply(silu, up))
