"""What a member of a team does of a product, of a norm and of attention.

Columns and rows are what is shared: whoever computes one computes it alone, so that the size of the
team changes no bit.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from core.kernels.ahead import list_blocks
from core.kernels.arithmetic import GROUP, PANEL_COLUMNS, elements_per_word
from core.kernels.attention.cpu import block_bytes
from core.kernels.compile import kernel
from core.kernels.mixed import columns_of_tile, group_bytes, multiply_columns, norm_rows
from core.kernels.team import Share, share


@kernel
def row_bytes(arithmetic, nibbles, num_inputs):
    """Bytes of a row of inputs of a product."""
    return num_inputs // GROUP * group_bytes(arithmetic, nibbles)


@kernel
def multiply_share(
    arithmetic, nibbles, team, inputs, input_stride, num_rows, panels, num_inputs, num_panels, bias,
    outputs, output_stride, accumulates, scratch,
):  # fmt: skip
    """The member's columns of a product, whole tiles; arguments as of `multiply_columns`."""
    columns = columns_of_tile(arithmetic, nibbles, num_rows)
    mine = share(team, num_panels * (PANEL_COLUMNS // columns))
    multiply_columns(
        arithmetic, nibbles, inputs, input_stride, num_rows, panels, num_inputs,
        mine.first * columns, mine.end * columns, bias, outputs, output_stride, accumulates,
        scratch,
    )  # fmt: skip


@kernel
def norm_share(
    arithmetic, nibbles, team, hidden_TG, num_rows, size, weight_G, eps, rounds, out
):  # fmt: skip
    """The member's rows of a norm; arguments as of `norm_rows`."""
    mine = share(team, num_rows)
    norm_rows(
        arithmetic, nibbles, hidden_TG[mine.first : mine.end], mine.end - mine.first, size,
        weight_G, eps, rounds,
        out + mine.first * row_bytes(arithmetic, nibbles, hidden_TG.shape[1]),
    )  # fmt: skip


@kernel
def share_of_rows(arithmetic, team, rows):
    """The member's rows of attention: two that have a word of the cache together stay together."""
    mine = share(team, rows.num_rows)
    return Share(whole_words(arithmetic, rows, mine.first), whole_words(arithmetic, rows, mine.end))


@kernel
def whole_words(arithmetic, rows, row):
    """The first row from `row` on that begins a word of values in the cache."""
    while (
        0 < row < rows.num_rows
        and rows.slots_T[row] == rows.slots_T[row - 1]
        and rows.positions_T[row] % elements_per_word(arithmetic) > 0
    ):
        row += 1
    return row


@kernel
def list_share(arithmetic, heads, team, rows, window, ahead):
    """Notes the blocks that attention of the member's rows reads; see `core.kernels.ahead`."""
    mine = Share(0, rows.num_rows)
    if rows.num_rows >= team.size:
        mine = share_of_rows(arithmetic, team, rows)
    list_blocks(rows, mine.first, mine.end, window, block_bytes(arithmetic, heads), ahead)
