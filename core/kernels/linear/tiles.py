"""The register tile of a linear projection, as an LLVM intrinsic for numba."""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from numba import types

from core.kernels.compile import intrinsic
from core.kernels.linear.integer_tiles import emit_integer_tiles
from core.kernels.linear.nibble_tiles import emit_nibble_tiles
from core.kernels.tiles import (
    PANEL_ROW_BYTES,
    Fetches,
    emit_dot,
    emit_for_rows,
    emit_inputs,
    emit_loop,
    emit_row_addresses,
    emit_weights,
    vector_addresses,
)
from core.kernels.vectors import FLOATS, emit_load, emit_store, index


@intrinsic
def product_tile(
    typing_context,
    arithmetic,
    num_rows,
    inputs,
    input_stride,
    weights,
    num_inputs,
    bias,
    outputs,
    output_stride,
    accumulates,
    fetch,
    fetch_step,
    also,
    also_step,
):
    """outputs = bias + inputs x weights for some rows and the columns of a tile of as many rows.

    1 to `most_rows`, see `core.kernels.arithmetic`.

    Arguments are addresses and byte strides: `inputs` rows in the input format, `weights` a
    packed panel, `bias` and `outputs` float32; `num_inputs` is a multiple of 64. Where
    `accumulates` is not 0, what `outputs` holds is added.
    Meanwhile memory from the addresses `fetch` and `also` on is fetched, for each row of weights
    `fetch_step` and `also_step` bytes further.
    """
    kind = arithmetic.arithmetic

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if kind.has_nibbles:
            emit_nibble_tiles(builder, kind, Fetches(*args[10:]), *args[1:10])
            return context.get_dummy_value()
        if kind.is_integer:
            emit_integer_tiles(builder, kind, Fetches(*args[10:]), *args[1:10])
            return context.get_dummy_value()
        _, num_rows, inputs, input_stride, weights, num_inputs, bias, outputs, *rest = args
        output_stride, accumulates, *rest = rest
        fetches = Fetches(*rest)
        num_words = builder.udiv(num_inputs, index(kind.elements_per_word))

        def emit(rows: int) -> None:
            vectors = kind.tile_vectors(rows)
            biases = [
                emit_load(builder, at, FLOATS) for at in vector_addresses(builder, bias, vectors)
            ]
            input_rows = emit_row_addresses(builder, inputs, input_stride, rows)

            def body(step: Any, sums: list[Any]) -> list[Any]:
                row = builder.add(weights, builder.mul(step, index(PANEL_ROW_BYTES)))
                fetches.emit(builder, step, vectors)
                panel = [
                    emit_weights(builder, kind, at)
                    for at in vector_addresses(builder, row, vectors)
                ]
                results = []
                for number, input_row in enumerate(input_rows):
                    values = emit_inputs(builder, kind, input_row, step)
                    results += [
                        emit_dot(builder, kind, sums[number * vectors + vector], values, weight)
                        for vector, weight in enumerate(panel)
                    ]
                return results

            sums = emit_loop(builder, num_words, biases * rows, body)
            for number, row in enumerate(emit_row_addresses(builder, outputs, output_stride, rows)):
                for vector, at in enumerate(vector_addresses(builder, row, vectors)):
                    _emit_output(builder, sums[number * vectors + vector], at, accumulates)

        emit_for_rows(builder, num_rows, emit, most=kind.most_tile_rows)
        return context.get_dummy_value()

    return types.void(arithmetic, *[types.intp] * 13), codegen


def _emit_output(builder: Any, value: Any, where: Any, accumulates: Any) -> None:
    """Stores `value`, or adds it to what is there."""
    with builder.if_else(builder.icmp_signed("!=", accumulates, index(0))) as (then, otherwise):
        with then:
            emit_store(builder, builder.fadd(value, emit_load(builder, where, FLOATS)), where)
        with otherwise:
            emit_store(builder, value, where)
