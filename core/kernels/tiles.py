"""Register tiles: the innermost loops of products, as LLVM intrinsics for numba.

A tile keeps the sums of up to 13 rows in registers while it walks over the words of the
inner dimension. Each sum adds its terms in one fixed order, whatever the number of rows
in the tile, so that a row's result never depends on the rows beside it.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from core.kernels.arithmetic import LANES, MAX_TILE_ROWS, PANEL_COLUMNS, Arithmetic
from core.kernels.compile import intrinsic
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    F32,
    FLOATS,
    I32,
    I64,
    WORDS,
    BFloat16,
    emit_call,
    emit_fma,
    emit_load,
    emit_splat,
    emit_store,
    index,
    splat_word,
)

WORD_BYTES = 4
PANEL_ROW_BYTES = PANEL_COLUMNS * WORD_BYTES


_PAIRS = ir.VectorType(BFloat16(), 2 * LANES)


def emit_weights(builder: Any, arithmetic: Arithmetic, where: Any) -> list[Any]:
    """16 words of weights, ready to be multiplied: element by element, or as pairs."""
    words = emit_load(builder, where, WORDS)
    if arithmetic.dots_pairs:
        return [builder.bitcast(words, _PAIRS)]
    if arithmetic.number_format == "fp32":
        return [builder.bitcast(words, FLOATS)]
    lower = builder.shl(words, splat_word(16))
    upper = builder.and_(words, splat_word(0xFFFF0000))
    return [builder.bitcast(half, FLOATS) for half in (lower, upper)]


def emit_inputs(builder: Any, arithmetic: Arithmetic, row: Any, step: Any) -> list[Any]:
    """The inputs that belong to word `step` of the weights, each in every lane."""
    if arithmetic.dots_pairs:
        pair = emit_load(builder, builder.add(row, builder.mul(step, index(WORD_BYTES))), I32)
        return [builder.bitcast(emit_splat(builder, pair), _PAIRS)]
    count = arithmetic.elements_per_word
    first = builder.add(row, builder.mul(step, index(count * 4)))
    return [
        emit_splat(builder, emit_load(builder, builder.add(first, index(4 * i)), F32))
        for i in range(count)
    ]


def emit_dot(
    builder: Any, arithmetic: Arithmetic, sums: Any, inputs: list[Any], weights: list[Any]
) -> Any:
    """sums + inputs . weights, lane by lane; a word's elements in order."""
    if arithmetic.dots_pairs:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return emit_call(builder, name, FLOATS, [sums, *inputs, *weights])
    for value, weight in zip(inputs, weights, strict=True):
        sums = emit_fma(builder, value, weight, sums)
    return sums


def emit_loop(
    builder: Any, count: Any, initial: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Runs `body(i, values) -> values` for i in 0 .. count - 1, at least once."""
    entry = builder.block
    loop = builder.append_basic_block("tile.loop")
    done = builder.append_basic_block("tile.done")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(I64)
    values = [builder.phi(value.type) for value in initial]
    results = body(step, values)
    following = builder.add(step, index(1))
    for phi, start, result in zip(
        [step, *values], [index(0), *initial], [following, *results], strict=True
    ):
        phi.add_incoming(start, entry)
        phi.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    return results


def emit_for_rows(
    builder: Any, num_rows: Any, emit: Callable[[int], None], *, most: int = MAX_TILE_ROWS
) -> None:
    """Branches to the code that `emit(rows)` makes for the number of rows, 1 to `most`."""
    origin = builder.block
    done = builder.append_basic_block("tile.end")
    unreachable = builder.append_basic_block("tile.unreachable")
    builder.position_at_end(unreachable)
    builder.unreachable()
    builder.position_at_end(origin)
    switch = builder.switch(num_rows, unreachable)
    for rows in range(1, most + 1):
        block = builder.append_basic_block(f"tile.rows{rows}")
        switch.add_case(index(rows), block)
        builder.position_at_end(block)
        emit(rows)
        builder.branch(done)
    builder.position_at_end(done)


def emit_row_addresses(builder: Any, start: Any, stride: Any, rows: int) -> list[Any]:
    return [builder.add(start, builder.mul(stride, index(row))) for row in range(rows)]


def emit_prefetch(builder: Any, where: Any, num_lines: int) -> None:
    """Asks for cache lines, into the second-level cache; harmless at any address."""
    for line in vector_addresses(builder, where, num_lines):
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]  # read, level 2, data
        pointer = builder.inttoptr(line, ir.PointerType())
        emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *hints])


def vector_addresses(builder: Any, start: Any, count: int) -> list[Any]:
    return [builder.add(start, index(BYTES_OF_FLOATS * vector)) for vector in range(count)]


@intrinsic
def product_tile(
    typing_context,
    arithmetic,
    num_rows,
    inputs,
    input_stride,
    weights,
    num_words,
    bias,
    outputs,
    output_stride,
    accumulates,
    fetch_offset,
):
    """outputs = bias + inputs x weights for some rows and the columns of a tile of as many rows.

    1 to `most_rows`, see `core.kernels.arithmetic`.

    Arguments are addresses and byte strides: `inputs` rows in the input format, `weights` a
    packed panel (`num_words` rows of 64 words), `bias` and `outputs` float32. Where
    `accumulates` is not 0, the sum is added to what `outputs` holds.
    Meanwhile what lies `fetch_offset` bytes behind the weights is fetched, such as the next panel:
    few rows are bound by memory.
    """
    kind = arithmetic.arithmetic

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, num_rows, inputs, input_stride, weights, num_words, bias, outputs, *rest = args
        output_stride, accumulates, fetch_offset = rest

        def emit(rows: int) -> None:
            vectors = kind.tile_vectors(rows)
            biases = [
                emit_load(builder, at, FLOATS) for at in vector_addresses(builder, bias, vectors)
            ]
            input_rows = emit_row_addresses(builder, inputs, input_stride, rows)

            def body(step: Any, sums: list[Any]) -> list[Any]:
                row = builder.add(weights, builder.mul(step, index(PANEL_ROW_BYTES)))
                emit_prefetch(builder, builder.add(row, fetch_offset), vectors)
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

    return types.void(arithmetic, *[types.intp] * 10), codegen


def _emit_output(builder: Any, value: Any, where: Any, accumulates: Any) -> None:
    """Stores `value`, or adds it to what is there."""
    with builder.if_else(builder.icmp_signed("!=", accumulates, index(0))) as (then, otherwise):
        with then:
            emit_store(builder, builder.fadd(value, emit_load(builder, where, FLOATS)), where)
        with otherwise:
            emit_store(builder, value, where)
