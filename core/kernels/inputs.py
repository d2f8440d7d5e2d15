"""How float32 rows become the inputs of a product: as they are, as bfloat16, or as int8.

int8 inputs have a scale for each group of 64: the largest magnitude becomes 127 (64 beside matrices
of 4 bits), the others are rounded to the nearest integer, ties to even. A group lies as 64 bytes,
the scale (float32) and -128 x the sum of the integers (int32): see
`core.kernels.linear.integer_tiles`. For "avx2", where the largest is 127, the integers have 16
bits, and of each four the second and the third change places. Instead of the last, int4 has the
scale x the sum of the integers (float32) of each half of the group.

A great input makes the scale of its group coarse for all others. Those of int8 are *spread* first:
each four of a group that lie 16 apart are multiplied by a Hadamard matrix, and so are the weights,
divided by four, which leaves their product as it is ("QuaRot": Ashkboos et al., arXiv 2404.00456).
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from core.kernels.arithmetic import GROUP, LANES, input_bytes, input_group_bytes, unquantised
from core.kernels.compile import intrinsic, kernel
from core.kernels.elements import emit_store_inputs, load_inputs
from core.kernels.tiles import emit_loop
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    F32,
    FLOATS,
    HALVES,
    I32,
    WORDS,
    emit_call,
    emit_load,
    emit_splat,
    emit_store,
    float32x16,
    index,
    splat_constant,
    splat_word,
)

LARGEST = 127  # of weights
UNSIGNED_OFFSET = 128  # added to weights, see `core.kernels.linear.integer_tiles`
# Groups and columns below are all zero: the inverse of their scale may not be finite.
LEAST_MAGNITUDE = 1e-30
# A float32 of this size has no fraction: adding it rounds, and leaves an integer in the low bits.
ROUNDER = float(3 << 22)
_ROUNDER_BITS = 0x4B400000
_BYTES = ir.VectorType(ir.IntType(8), LANES)
# Of four bytes in a word, the first and the third are one pair of 16 bits, the others one.
_IN_PAIRS = [first + offset for first in range(0, LANES, 4) for offset in (0, 2, 1, 3)]


@intrinsic
def store_input_group(typing_context, arithmetic, where, first, second, third, fourth):
    """64 neighbouring inputs of a product, from four vectors."""
    kind = arithmetic.arithmetic

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        _, where, *vectors = args
        if kind.is_integer:
            vectors = vectors if kind.has_nibbles else _emit_spread(builder, vectors)
            in_pairs = kind.widens_integers
            scale, inverse = _emit_scale(builder, vectors, kind.largest_input)
            wholes = _emit_rounded(builder, where, vectors, inverse, in_pairs=in_pairs)
            end = builder.add(where, index(2 * GROUP if in_pairs else GROUP))
            emit_end = _emit_scaled_sums if kind.has_nibbles else _emit_correction
            emit_end(builder, end, scale, wholes)
        else:
            for number, floats in enumerate(vectors):
                offset = index(number * LANES * kind.input_bytes)
                emit_store_inputs(builder, kind, builder.add(where, offset), floats)
        return context.get_dummy_value()

    return types.void(arithmetic, types.intp, *[float32x16] * 4), codegen


@intrinsic
def spread_weights(typing_context, where):
    """Replaces 64 neighbouring weights of a column, at an address, by what belongs to inputs that
    were spread."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        places = [builder.add(args[0], index(n * BYTES_OF_FLOATS)) for n in range(4)]
        vectors = [emit_load(builder, at, FLOATS) for at in places]
        for at, floats in zip(places, _emit_spread(builder, vectors), strict=True):
            emit_store(builder, builder.fmul(floats, splat_constant(0.25)), at)
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def _emit_spread(builder: Any, vectors: list[Any]) -> list[Any]:
    """Four vectors times the Hadamard matrix of that size, which is four times its own inverse."""
    first, second, third, fourth = vectors
    sums = builder.fadd(first, second), builder.fadd(third, fourth)
    differences = builder.fsub(first, second), builder.fsub(third, fourth)
    return [
        builder.fadd(*sums),
        builder.fadd(*differences),
        builder.fsub(*sums),
        builder.fsub(*differences),
    ]


@intrinsic
def store_bytes(typing_context, where, inverse, first, second, third, fourth):
    """64 neighbouring weights of a column, times `inverse`, as signed bytes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        where, inverse, *vectors = args
        _emit_rounded(builder, where, vectors, inverse, in_pairs=False)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, *[float32x16] * 4), codegen


@intrinsic
def largest_magnitude(typing_context, where, num_vectors):
    """Of 16 x `num_vectors` floats at an address, at least 16; NaN where one of them is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        def body(step: Any, largest: list[Any]) -> list[Any]:
            at = builder.add(args[0], builder.mul(step, index(BYTES_OF_FLOATS)))
            return [_emit_larger(builder, largest[0], emit_load(builder, at, FLOATS))]

        return _emit_magnitude(builder, emit_loop(builder, args[1], [splat_word(0)], body)[0])

    return types.float32(types.intp, types.intp), codegen


def _emit_larger(builder: Any, largest: Any, floats: Any) -> Any:
    """In each lane, the bits of the larger magnitude: as integers these are in order, and NaN is
    the greatest."""
    bits = builder.and_(builder.bitcast(floats, WORDS), splat_word(0x7FFFFFFF))
    return builder.select(builder.icmp_unsigned(">", bits, largest), bits, largest)


def _emit_magnitude(builder: Any, largest: Any) -> Any:
    """The largest of all lanes, as a float."""
    largest = emit_call(builder, "llvm.vector.reduce.umax.v16i32", I32, [largest])
    return builder.bitcast(largest, F32)


def _emit_scale(builder: Any, vectors: list[Any], most: int) -> tuple[Any, Any]:
    """What a group's integers are multiples of, which a NaN makes one, and its inverse."""
    largest = splat_word(0)
    for floats in vectors:
        largest = _emit_larger(builder, largest, floats)
    magnitude = _emit_magnitude(builder, largest)
    scale = builder.fmul(magnitude, ir.Constant(F32, float(np.float32(1.0 / most))))
    inverse = builder.select(
        builder.fcmp_ordered(">", magnitude, ir.Constant(F32, float(np.float32(LEAST_MAGNITUDE)))),
        builder.fdiv(ir.Constant(F32, float(most)), magnitude),
        ir.Constant(F32, 0.0),
    )
    return scale, inverse


def _emit_rounded(
    builder: Any, where: Any, vectors: list[Any], inverse: Any, *, in_pairs: bool
) -> list[Any]:
    """Stores a group, times `inverse`, as 64 signed integers; returns those of each vector, as
    words."""
    wholes = []
    for number, floats in enumerate(vectors):
        scaled = builder.fmul(floats, emit_splat(builder, inverse))
        rounded = builder.bitcast(builder.fadd(scaled, splat_constant(ROUNDER)), WORDS)
        wholes.append(builder.sub(rounded, splat_word(_ROUNDER_BITS)))
        offset = index(number * LANES * (2 if in_pairs else 1))
        emit_store_integers(builder, rounded, builder.add(where, offset), in_pairs=in_pairs)
    return wholes


def emit_store_integers(builder: Any, words: Any, where: Any, *, in_pairs: bool) -> None:
    """Stores the lowest byte of each of 16 words; or the lowest two, as pairs are multiplied."""
    if in_pairs:
        halves = builder.trunc(words, HALVES)
        integers = builder.shuffle_vector(halves, halves, ir.Constant(WORDS, _IN_PAIRS))
    else:
        integers = builder.trunc(words, _BYTES)
    emit_store(builder, integers, where, align=1)


def _emit_correction(builder: Any, where: Any, scale: Any, wholes: list[Any]) -> None:
    """The scale, and what corrects a sum with unsigned weights."""
    correction = builder.mul(_emit_sum(builder, wholes), ir.Constant(I32, -UNSIGNED_OFFSET))
    emit_store(builder, scale, where)
    emit_store(builder, correction, builder.add(where, index(4)))


def _emit_scaled_sums(builder: Any, where: Any, scale: Any, wholes: list[Any]) -> None:
    """The scale, and the sum of each half, scaled."""
    emit_store(builder, scale, where)
    for number, half in enumerate((wholes[:2], wholes[2:])):
        total = builder.sitofp(_emit_sum(builder, half), F32)
        at = builder.add(where, index(4 + 4 * number))
        emit_store(builder, builder.fmul(total, scale), at)


def _emit_sum(builder: Any, wholes: list[Any]) -> Any:
    """The sum of all lanes of all vectors."""
    lanes = wholes[0]
    for total in wholes[1:]:
        lanes = builder.add(lanes, total)
    return emit_call(builder, "llvm.vector.reduce.add.v16i32", I32, [lanes])


@kernel
def input_row_bytes(arithmetic, num_inputs):
    """Bytes of a row of inputs."""
    return num_inputs // GROUP * input_group_bytes(arithmetic)


@kernel
def quantise_rows(arithmetic, source, num_rows, num_inputs, target):
    """Turns rows of inputs in the arithmetic beside int8 into rows of its own; by address."""
    beside = unquantised(arithmetic)
    for group in range(num_rows * (num_inputs // GROUP)):
        where = source + group * GROUP * input_bytes(beside)
        step = LANES * input_bytes(beside)
        store_input_group(
            arithmetic,
            target + group * input_group_bytes(arithmetic),
            load_inputs(beside, where),
            load_inputs(beside, where + step),
            load_inputs(beside, where + 2 * step),
            load_inputs(beside, where + 3 * step),
        )
