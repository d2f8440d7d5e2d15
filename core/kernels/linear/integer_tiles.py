"""The register tile of a product of int8 weights and int8 inputs.

Of each row of inputs, a group of 64 lies as 64 bytes, a float32 scale and an int32 correction.
Of each panel of weights, a group lies as 16 rows of 64 words of four bytes; behind all groups are
64 float32 scales, one for each column. The groups' sums are exact integers; times the scale of the
inputs they are added to a float32 sum, group by group, and that, times the column's, to the bias.
(Weights with a scale for each group take an instruction more for each sum of a group: of 192 that
multiply bytes in a tile, the scales take 24, and so 12.)

The instruction that multiplies bytes wants one operand unsigned. Weights are stored with 128
added, which adds 128 x (the sum of the group's inputs) to the sum; the correction takes that back.

AVX2's adds two products to 16 bits, which saturate: there both operands become 16 bits, the inputs
when they are quantised, the weights for each tile, and pairs of them are multiplied and added.
Inputs up to 64 do not saturate it, and are multiplied a third faster.
"""

from __future__ import annotations

from typing import Any

from core.kernels.arithmetic import GROUP, Arithmetic
from core.kernels.tiles import (
    PANEL_ROW_BYTES,
    Fetches,
    emit_for_rows,
    emit_loop,
    emit_row_addresses,
    emit_word_products,
    vector_addresses,
)
from core.kernels.vectors import (
    F32,
    FLOATS,
    I32,
    WORDS,
    emit_fma,
    emit_load,
    emit_splat,
    emit_store,
    index,
    splat_constant,
)

STEPS = GROUP // 4  # words of a group
STEPS_AT_A_TIME = 4
# Offsets of a group of inputs from its end.
SCALE = -8
CORRECTION = -4


def emit_integer_tiles(
    builder: Any,
    kind: Arithmetic,
    fetches: Fetches,
    num_rows: Any,
    inputs: Any,
    input_stride: Any,
    weights: Any,
    num_inputs: Any,
    bias: Any,
    outputs: Any,
    output_stride: Any,
    accumulates: Any,
) -> None:
    """Code for a tile of any number of rows; see `core.kernels.linear.tiles.product_tile`."""
    num_groups = builder.udiv(num_inputs, index(GROUP))
    is_new = builder.icmp_signed("==", accumulates, index(0))

    def emit(rows: int) -> None:
        vectors = kind.tile_vectors(rows)
        input_rows = emit_row_addresses(builder, inputs, input_stride, rows)
        targets = [
            at
            for row in emit_row_addresses(builder, outputs, output_stride, rows)
            for at in vector_addresses(builder, row, vectors)
        ]

        def add_group(group: Any, floats: list[Any]) -> list[Any]:
            offset = builder.mul(group, index(kind.input_group_bytes))
            groups = [builder.add(row, offset) for row in input_rows]
            panel = builder.add(weights, builder.mul(group, index(kind.weight_group_bytes)))
            rows_before = builder.mul(group, index(STEPS))
            sums = _emit_group(builder, kind, groups, panel, rows_before, fetches, vectors)
            return _emit_scaled(builder, kind, groups, sums, floats, vectors)

        zero = splat_constant(0.0)
        sums = emit_loop(builder, num_groups, [zero] * len(targets), add_group)
        fetches.emit(builder, builder.mul(num_groups, index(STEPS)), vectors)
        behind = builder.add(weights, builder.mul(num_groups, index(kind.weight_group_bytes)))
        scales, biases = (
            [emit_load(builder, at, FLOATS) for at in vector_addresses(builder, start, vectors)]
            for start in (behind, bias)
        )
        for number, (value, at) in enumerate(zip(sums, targets, strict=True)):
            before = builder.select(is_new, zero, emit_load(builder, at, FLOATS))
            start = builder.fadd(biases[number % vectors], before)
            emit_store(builder, emit_fma(builder, value, scales[number % vectors], start), at)

    emit_for_rows(builder, num_rows, emit, most=kind.most_tile_rows)


def _emit_group(
    builder: Any,
    kind: Arithmetic,
    groups: list[Any],
    panel: Any,
    rows_before: Any,
    fetches: Fetches,
    vectors: int,
) -> list[Any]:
    """The integer sums of one group, row by row."""
    sums = []
    for group in groups:
        at = builder.add(group, index(kind.input_group_bytes + CORRECTION))
        correction = emit_load(builder, at, I32)
        sums += [emit_splat(builder, correction)] * vectors

    def add_words(step: Any, sums: list[Any]) -> list[Any]:
        for word in range(STEPS_AT_A_TIME):
            number = builder.add(builder.mul(step, index(STEPS_AT_A_TIME)), index(word))
            row = builder.add(panel, builder.mul(number, index(PANEL_ROW_BYTES)))
            fetches.emit(builder, builder.add(rows_before, number), vectors)
            weights = [
                emit_load(builder, at, WORDS) for at in vector_addresses(builder, row, vectors)
            ]
            sums = emit_word_products(builder, kind, groups, number, weights, sums)
        return sums

    return emit_loop(builder, index(STEPS // STEPS_AT_A_TIME), sums, add_words)


def _emit_scaled(
    builder: Any,
    kind: Arithmetic,
    groups: list[Any],
    sums: list[Any],
    floats: list[Any],
    vectors: int,
) -> list[Any]:
    """floats + sums x the scale of the row's group."""
    results: list[Any] = []
    for group in groups:
        at = builder.add(group, index(kind.input_group_bytes + SCALE))
        scale = emit_splat(builder, emit_load(builder, at, F32))
        for _ in range(vectors):
            number = len(results)
            whole = builder.sitofp(sums[number], FLOATS)
            results.append(emit_fma(builder, whole, scale, floats[number]))
    return results
