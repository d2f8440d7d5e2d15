"""Products of a stage whose matrices have 4 bits each or 8, as the file has them.

Each takes `nibbles`, whether the matrix at hand has 4 bits, and does what the function of the same
name does in the arithmetic of that matrix. In an arithmetic without nibbles nothing is chosen.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from core.kernels.activation.cpu import silu_multiply_panel as silu_multiply_panel_as
from core.kernels.arithmetic import has_nibbles, input_group_bytes, of_bytes
from core.kernels.compile import kernel
from core.kernels.inputs import quantise_rows as quantise_rows_as
from core.kernels.linear.cpu import cut_into_tiles
from core.kernels.linear.cpu import greedy_tokens as greedy_tokens_as
from core.kernels.linear.cpu import multiply_columns as multiply_columns_as
from core.kernels.linear.cpu import panel_bytes as panel_bytes_as
from core.kernels.norm.cpu import norm_rows as norm_rows_as


@kernel
def norm_rows(arithmetic, nibbles, hidden_TG, num_rows, size, weight_G, eps, rounds, out):
    """See `core.kernels.norm.cpu`."""
    if has_nibbles(arithmetic) and not nibbles:
        norm_rows_as(of_bytes(arithmetic), hidden_TG, num_rows, size, weight_G, eps, rounds, out)
    else:
        norm_rows_as(arithmetic, hidden_TG, num_rows, size, weight_G, eps, rounds, out)


@kernel
def quantise_rows(arithmetic, nibbles, source, num_rows, num_inputs, target):
    """See `core.kernels.inputs`."""
    if has_nibbles(arithmetic) and not nibbles:
        quantise_rows_as(of_bytes(arithmetic), source, num_rows, num_inputs, target)
    else:
        quantise_rows_as(arithmetic, source, num_rows, num_inputs, target)


@kernel
def silu_multiply_panel(arithmetic, nibbles, gate_up, num_rows, out, out_stride):
    """See `core.kernels.activation.cpu`."""
    if has_nibbles(arithmetic) and not nibbles:
        silu_multiply_panel_as(of_bytes(arithmetic), gate_up, num_rows, out, out_stride)
    else:
        silu_multiply_panel_as(arithmetic, gate_up, num_rows, out, out_stride)


@kernel
def group_bytes(arithmetic, nibbles):
    """Bytes of 64 inputs."""
    if has_nibbles(arithmetic) and not nibbles:
        return input_group_bytes(of_bytes(arithmetic))
    return input_group_bytes(arithmetic)


@kernel
def panel_bytes(arithmetic, nibbles, num_inputs):
    """See `core.kernels.linear.cpu`."""
    if has_nibbles(arithmetic) and not nibbles:
        return panel_bytes_as(of_bytes(arithmetic), num_inputs)
    return panel_bytes_as(arithmetic, num_inputs)


@kernel
def columns_of_tile(arithmetic, nibbles, num_rows):
    """Columns that a tile of a product with so many rows has."""
    if has_nibbles(arithmetic) and not nibbles:
        return cut_into_tiles(of_bytes(arithmetic), num_rows)[1]
    return cut_into_tiles(arithmetic, num_rows)[1]


@kernel
def multiply_columns(
    arithmetic, nibbles, inputs, input_stride, num_rows, panels, num_inputs, first_column,
    end_column, bias, outputs, output_stride, accumulates, scratch,
):  # fmt: skip
    """See `core.kernels.linear.cpu`."""
    if has_nibbles(arithmetic) and not nibbles:
        multiply_columns_as(
            of_bytes(arithmetic), inputs, input_stride, num_rows, panels, num_inputs, first_column,
            end_column, bias, outputs, output_stride, accumulates, scratch,
        )  # fmt: skip
    else:
        multiply_columns_as(
            arithmetic, inputs, input_stride, num_rows, panels, num_inputs, first_column,
            end_column, bias, outputs, output_stride, accumulates, scratch,
        )  # fmt: skip


@kernel
def greedy_tokens(
    arithmetic, nibbles, inputs, input_stride, num_rows, panels, num_inputs, num_panels, bias,
    logits, tokens, best, scratch,
):  # fmt: skip
    """See `core.kernels.linear.cpu`."""
    if has_nibbles(arithmetic) and not nibbles:
        greedy_tokens_as(
            of_bytes(arithmetic), inputs, input_stride, num_rows, panels, num_inputs, num_panels,
            bias, logits, tokens, best, scratch,
        )  # fmt: skip
    else:
        greedy_tokens_as(
            arithmetic, inputs, input_stride, num_rows, panels, num_inputs, num_panels, bias,
            logits, tokens, best, scratch,
        )  # fmt: skip
