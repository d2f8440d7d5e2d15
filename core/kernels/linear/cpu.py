"""Linear projections with packed weights, on the CPU.

Weights lie in panels of 64 columns: panel after panel, and within a panel one row of 64
words for each word of the inner dimension, so that a product reads memory in order and a
register tile loads whole vectors. Columns and inner elements beyond the matrix are zero. int8
panels have the columns' scales behind them.

Letters: T rows, K inputs, N outputs.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.kernels.ahead import LINE, is_due, next_piece
from core.kernels.arithmetic import (
    GROUP,
    LANES,
    MAX_TILE_ROWS,
    PANEL_COLUMNS,
    element_bytes,
    elements_per_word,
    is_integer,
    most_tile_rows,
    scale_bytes,
    tile_columns,
    weight_group_bytes,
    widened,
    widens,
)
from core.kernels.compile import kernel
from core.kernels.elements import store_elements, widen_words
from core.kernels.inputs import (
    LARGEST,
    LEAST_MAGNITUDE,
    largest_magnitude,
    spread_weights,
    store_bytes,
)
from core.kernels.linear.tiles import product_tile
from core.kernels.tiles import PANEL_ROW_BYTES
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    address,
    largest_lane,
    load_floats,
    load_word,
    maximum,
    store_float,
    store_word,
)

# Measured in GFLOP/s of one core with and without widening once: 576 inputs and 96 rows 141, 145;
# 128: 147, 145; 256: 153, 145. With 1,536 inputs the wide panel crowds the second-level cache:
# 256 rows 140, 147.
LEAST_ROWS_TO_WIDEN_ONCE = 128
MOST_INPUTS_TO_WIDEN_ONCE = 1024


class PanelScratch(NamedTuple):
    """What a product works in."""

    wide_panel: npt.NDArray[np.float32]  # a panel of weights, widened
    ahead: npt.NDArray[np.int64]  # what is fetched meanwhile, see `core.kernels.ahead`


@kernel
def pack_panels(arithmetic, weight_NK, num_inputs, panels, first_column, column_step, scratch):
    """Packs a float32 [N, K] matrix into `panels` (uint32, flat), rounding to the format.

    Column n of the product is placed at `first_column` + n, except that every whole run of 64
    columns moves on by `column_step` columns (64: dense; 128: every other panel). `num_inputs`
    is the padded inner dimension. `scratch`: float32, as many.
    """
    num_columns, size = weight_NK.shape
    target = address(panels)
    for n in range(num_columns):
        for k in range(size):
            scratch[k] = weight_NK[n, k]
        for k in range(size, num_inputs):
            scratch[k] = np.float32(0.0)
        column = first_column + n // PANEL_COLUMNS * column_step + n % PANEL_COLUMNS
        panel = target + column // PANEL_COLUMNS * panel_bytes(arithmetic, num_inputs)
        where = panel + column % PANEL_COLUMNS * 4
        if is_integer(arithmetic):
            pack_integer_column(arithmetic, address(scratch), num_inputs, where)
        else:
            pack_column(arithmetic, address(scratch), num_inputs, where)


@kernel
def pack_column(arithmetic, floats, num_inputs, where):
    """Rounds a column's weights, in place, and writes them from `where` on; by address."""
    for vector in range(num_inputs // LANES):
        # In place: elements are at most as wide as the floats they come from.
        source = load_floats(floats + vector * BYTES_OF_FLOATS)
        store_elements(arithmetic, floats + vector * LANES * element_bytes(arithmetic), source)
    for word in range(num_inputs // elements_per_word(arithmetic)):
        store_word(where + word * PANEL_ROW_BYTES, load_word(floats + word * 4))


@kernel
def pack_integer_column(arithmetic, floats, num_inputs, where):
    """As `pack_column`, for int8: words with 128 added to each byte, then the column's scale. The
    weights are spread as the inputs will be (see `core.kernels.inputs`)."""
    for group in range(num_inputs // GROUP):
        spread_weights(floats + group * GROUP * 4)
    magnitude = largest_magnitude(floats, num_inputs // LANES)
    inverse = np.float32(0.0)
    if magnitude > np.float32(LEAST_MAGNITUDE):
        inverse = np.float32(LARGEST) / magnitude
    for group in range(num_inputs // GROUP):
        source = floats + group * GROUP * 4
        store_bytes(
            source, inverse, load_floats(source), load_floats(source + BYTES_OF_FLOATS),
            load_floats(source + 2 * BYTES_OF_FLOATS), load_floats(source + 3 * BYTES_OF_FLOATS),
        )  # fmt: skip
        target = where + group * weight_group_bytes(arithmetic)
        for word in range(GROUP // elements_per_word(arithmetic)):
            value = load_word(source + word * 4) ^ np.uint32(0x80808080)
            store_word(target + word * PANEL_ROW_BYTES, value)
    scale = magnitude * np.float32(1.0 / LARGEST)
    store_float(where + num_inputs // GROUP * weight_group_bytes(arithmetic), scale)


@kernel
def panel_bytes(arithmetic, num_inputs):
    """Bytes of a packed panel."""
    return num_inputs // GROUP * weight_group_bytes(arithmetic) + scale_bytes(arithmetic)


@kernel
def cut_into_tiles(arithmetic, num_rows):
    """Tiles of nearly equal height that rows are cut into, and a tile's columns."""
    most_rows = most_tile_rows(arithmetic)
    if num_rows <= MAX_TILE_ROWS:
        most_rows = min(most_rows, MAX_TILE_ROWS)
    num_tiles = (num_rows + most_rows - 1) // most_rows
    return num_tiles, tile_columns(arithmetic, (num_rows + num_tiles - 1) // num_tiles)


@kernel
def tiles_of_panel(arithmetic, num_rows):
    """How many tiles the product with one panel consists of."""
    num_tiles, columns = cut_into_tiles(arithmetic, num_rows)
    return num_tiles * (PANEL_COLUMNS // columns)


@kernel
def multiply_panel(
    arithmetic,
    inputs,
    input_stride,
    num_rows,
    panel,
    num_inputs,
    first_column,
    end_column,
    bias,
    outputs,
    output_stride,
    accumulates,
    ahead,
):
    """The product with columns of one panel; arguments as of `multiply_columns`.

    Rows are cut into tiles of nearly equal height.
    """
    num_tiles, columns = cut_into_tiles(arithmetic, num_rows)
    # Every tile fetches its share of the next panel, so that memory never rests.
    size = panel_bytes(arithmetic, num_inputs)
    num_shares = num_tiles * ((end_column - first_column) // columns)
    fetch, fetch_step = panel + size, PANEL_ROW_BYTES // num_shares
    # For that, several tiles need half of their fetches each.
    half = max(LINE, columns * 4 // 2)
    for first in range(first_column, end_column, columns):
        row = 0
        for tile in range(num_tiles):
            rows = (num_rows - row + num_tiles - tile - 1) // (num_tiles - tile)
            also, also_step = fetch + half, fetch_step
            if num_tiles > 1 and is_due(ahead):
                also, also_step = next_piece(ahead, size // PANEL_ROW_BYTES)
            product_tile(
                arithmetic,
                rows,
                inputs + row * input_stride,
                input_stride,
                panel + first * 4,
                num_inputs,
                bias + first * 4,
                outputs + row * output_stride + first * 4,
                output_stride,
                accumulates,
                fetch,
                fetch_step,
                also,
                also_step,
            )
            row += rows
            fetch += size // num_shares


@kernel
def widen_panel(panel, num_inputs, target):
    """Turns a panel of bfloat16 pairs into one of float32, by address."""
    for word in range(num_inputs // 2):
        for vector in range(PANEL_COLUMNS // LANES):
            offset = vector * BYTES_OF_FLOATS
            lower = target + 2 * word * PANEL_ROW_BYTES + offset
            where = panel + word * PANEL_ROW_BYTES + offset
            widen_words(where, lower, lower + PANEL_ROW_BYTES)


@kernel
def multiply_columns(
    arithmetic,
    inputs,
    input_stride,
    num_rows,
    panels,
    num_inputs,
    first_column,
    end_column,
    bias,
    outputs,
    output_stride,
    accumulates,
    scratch,
):
    """outputs[T, columns] = bias + inputs[T, K] x panels, or adds that to outputs.

    Columns from `first_column` on and before `end_column`, of all that panels, bias and outputs
    have: multiples of a tile's (see `cut_into_tiles`).
    All by address, strides in bytes: `inputs` in the input format, the others float32. K is
    `num_inputs`, a multiple of 64.
    `scratch` is a PanelScratch: where many rows share a panel that fits its `wide_panel`,
    widening it once costs less than in each tile, and the sums are the same. Where rows make
    several tiles, these fetch what is due `ahead`, too.
    """
    wide_panel, ahead = scratch.wide_panel, scratch.ahead
    widens_once = (
        widens(arithmetic)
        and num_rows >= LEAST_ROWS_TO_WIDEN_ONCE
        and num_inputs <= min(MOST_INPUTS_TO_WIDEN_ONCE, wide_panel.size // PANEL_COLUMNS)
    )
    if first_column == end_column:
        return
    end_panel = (end_column + PANEL_COLUMNS - 1) // PANEL_COLUMNS
    for number in range(first_column // PANEL_COLUMNS, end_panel):
        panel = panels + number * panel_bytes(arithmetic, num_inputs)
        offset = number * PANEL_ROW_BYTES
        first = max(first_column - number * PANEL_COLUMNS, 0)
        end = min(end_column - number * PANEL_COLUMNS, PANEL_COLUMNS)
        if widens_once:
            wide = address(wide_panel)
            widen_panel(panel, num_inputs, wide)
            multiply_panel(
                widened(arithmetic), inputs, input_stride, num_rows, wide, num_inputs,
                first, end, bias + offset, outputs + offset, output_stride, accumulates, ahead,
            )  # fmt: skip
        else:
            multiply_panel(
                arithmetic, inputs, input_stride, num_rows, panel, num_inputs,
                first, end, bias + offset, outputs + offset, output_stride, accumulates, ahead,
            )  # fmt: skip


@kernel
def greedy_tokens(
    arithmetic,
    inputs,
    input_stride,
    num_rows,
    panels,
    num_inputs,
    num_panels,
    bias,
    logits,
    tokens,
    best,
    scratch,
):
    """The column with the largest product for each row, the lowest one among equals.

    `logits` is scratch [T, 64], `tokens` int32 [T] and `best` float32 [T], the products. The
    panel's products never leave the cache. `bias` must be minus infinity for columns beyond the
    vocabulary. By address, except `logits`, `tokens`, `best` and `scratch` (as of
    `multiply_columns`).
    """
    for row in range(num_rows):
        best[row] = -np.inf
        tokens[row] = 0
    where = address(logits)
    for panel in range(num_panels):
        multiply_columns(
            arithmetic,
            inputs,
            input_stride,
            num_rows,
            panels + panel * panel_bytes(arithmetic, num_inputs),
            num_inputs,
            0,
            PANEL_COLUMNS,
            bias + panel * PANEL_ROW_BYTES,
            where,
            PANEL_ROW_BYTES,
            0,
            scratch,
        )
        for row in range(num_rows):
            at = where + row * PANEL_ROW_BYTES
            largest = load_floats(at)
            for vector in range(1, PANEL_COLUMNS // LANES):
                largest = maximum(largest, load_floats(at + vector * BYTES_OF_FLOATS))
            value = largest_lane(largest)
            if value > best[row]:
                best[row] = value
                for column in range(PANEL_COLUMNS):
                    if logits[row, column] == value:
                        tokens[row] = panel * PANEL_COLUMNS + column
                        break
