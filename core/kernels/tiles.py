"""What register tiles, the innermost loops of products and of attention, are made of.

A tile keeps the sums of up to 13 rows in registers while it walks over the words of the
inner dimension. Each sum adds its terms in one fixed order, whatever the number of rows
in the tile, so that a row's result never depends on the rows beside it.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from core.kernels.arithmetic import LANES, MAX_TILE_ROWS, PANEL_COLUMNS, Arithmetic
from core.kernels.elements import BFloat16
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    WORDS,
    emit_call,
    emit_fma,
    emit_load,
    emit_splat,
    index,
    splat_word,
)

WORD_BYTES = 4
PANEL_ROW_BYTES = PANEL_COLUMNS * WORD_BYTES


_PAIRS = ir.VectorType(BFloat16(), 2 * LANES)
_WIDE_PAIRS = ir.VectorType(I16, 2 * LANES)
_HALF = ir.VectorType(I32, LANES // 2)  # what a register without AVX-512 holds
_HALF_PAIRS = ir.VectorType(I16, LANES)
_HALF_BYTES = ir.VectorType(I8, 2 * LANES)


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


def emit_word_products(
    builder: Any,
    arithmetic: Arithmetic,
    rows: list[Any],
    number: Any,
    words: list[Any],
    sums: list[Any],
    *,
    signed: bool = False,
) -> list[Any]:
    """Adds to `sums`, row by row, the products of words of four bytes with word `number` of each
    row's integers.

    `rows` are addresses, of integers as `core.kernels.inputs` writes them. The words' bytes are
    unsigned and the rows' integers signed; where the words' are `signed`, the rows' are not.
    """
    if arithmetic.widens_integers:
        return _emit_pairs(builder, rows, number, words, sums, signed=signed)
    results: list[Any] = []
    for row in rows:
        at = builder.add(row, builder.mul(number, index(WORD_BYTES)))
        values = emit_splat(builder, emit_load(builder, at, I32))
        for word in words:
            operands = (values, word) if signed else (word, values)
            results.append(_emit_byte_dot(builder, arithmetic, sums[len(results)], *operands))
    return results


def _emit_byte_dot(
    builder: Any, arithmetic: Arithmetic, sums: Any, unsigned: Any, signed: Any
) -> Any:
    """sums + unsigned . signed, of four bytes in each lane; with AVX2 up to 64 signed."""
    if arithmetic.instructions == "avx2":
        pairs = _emit_halves(builder, "pmadd.ub.sw", _HALF_PAIRS, _HALF_BYTES, unsigned, signed)
        ones = ir.Constant(_WIDE_PAIRS, [1] * 2 * LANES)
        both = _emit_halves(builder, "pmadd.wd", _HALF, _HALF_PAIRS, pairs, ones)
        return builder.add(sums, both)
    if arithmetic.instructions == "avx512vnni":
        name = "llvm.x86.avx512.vpdpbusd.512"
        return emit_call(builder, name, WORDS, [sums, unsigned, signed])
    for shift in (0, 8, 16, 24):
        weight = builder.and_(builder.lshr(unsigned, splat_word(shift)), splat_word(0xFF))
        value = builder.ashr(builder.shl(signed, splat_word(24 - shift)), splat_word(24))
        sums = builder.add(sums, builder.mul(weight, value))
    return sums


def _emit_pairs(
    builder: Any, rows: list[Any], number: Any, words: list[Any], sums: list[Any], *, signed: bool
) -> list[Any]:
    """As `emit_word_products`, with pairs of 16 bits: of a word the first and third bytes, then
    the others."""
    parts = zip(*(_emit_widened(builder, word, signed=signed) for word in words), strict=True)
    for offset, pairs in zip((0, 4), parts, strict=True):
        results: list[Any] = []
        for row in rows:
            at = builder.add(row, builder.add(builder.mul(number, index(8)), index(offset)))
            values = emit_splat(builder, emit_load(builder, at, I32))
            for pair in pairs:
                product = _emit_halves(builder, "pmadd.wd", _HALF, _HALF_PAIRS, pair, values)
                results.append(builder.add(sums[len(results)], product))
        sums = results
    return sums


def _emit_widened(builder: Any, word: Any, *, signed: bool) -> tuple[Any, Any]:
    """The first and third bytes of each word, and the others, as pairs of 16 bits."""
    if not signed:
        mask = splat_word(0x00FF00FF)
        odd = builder.lshr(word, splat_word(8))
        return builder.and_(word, mask), builder.and_(odd, mask)
    halves = builder.bitcast(word, _WIDE_PAIRS)
    eight = ir.Constant(_WIDE_PAIRS, [8] * 2 * LANES)
    even = builder.ashr(builder.shl(halves, eight), eight)
    odd = builder.ashr(halves, eight)
    return builder.bitcast(even, WORDS), builder.bitcast(odd, WORDS)


def _emit_halves(builder: Any, name: str, result: Any, operand: Any, a: Any, b: Any) -> Any:
    """An instruction of AVX2 for each half of two vectors of 16 words; words again."""
    halves = []
    for first in (0, LANES // 2):
        lanes = ir.Constant(_HALF, list(range(first, first + LANES // 2)))
        parts = [builder.bitcast(value, WORDS) for value in (a, b)]
        parts = [
            builder.bitcast(builder.shuffle_vector(part, part, lanes), operand) for part in parts
        ]
        half = emit_call(builder, f"llvm.x86.avx2.{name}", result, parts)
        halves.append(builder.bitcast(half, _HALF))
    return builder.shuffle_vector(*halves, ir.Constant(WORDS, list(range(LANES))))


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
    last = builder.block  # another one than `loop` where the body has loops of its own
    for phi, start, result in zip(
        [step, *values], [index(0), *initial], [following, *results], strict=True
    ):
        phi.add_incoming(start, entry)
        phi.add_incoming(result, last)
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


class Fetches(NamedTuple):
    """Two pieces of memory that a tile fetches: where each begins, and how many bytes further it
    goes for each row of weights."""

    first: Any
    first_step: Any
    second: Any
    second_step: Any

    def emit(self, builder: Any, number: Any, num_lines: int) -> None:
        """Asks for so many cache lines beside row `number` of the weights: half of each piece."""
        first = builder.add(self.first, builder.mul(number, self.first_step))
        second = builder.add(self.second, builder.mul(number, self.second_step))
        half = max(1, num_lines // 2)
        emit_prefetch(builder, first, half)
        emit_prefetch(builder, second, half)


def vector_addresses(builder: Any, start: Any, count: int) -> list[Any]:
    return [builder.add(start, index(BYTES_OF_FLOATS * vector)) for vector in range(count)]
