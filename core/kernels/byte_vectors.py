"""Vectors of float32 as bytes: the integers of the cache, of queries and of attention's weights.

What the integers are multiples of, their scale, lies apart: a number is the integer times it.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from core.kernels.arithmetic import LANES
from core.kernels.compile import inlined, intrinsic
from core.kernels.inputs import LEAST_MAGNITUDE, ROUNDER, emit_store_integers
from core.kernels.vectors import (
    I8,
    I32,
    WORDS,
    emit_load,
    emit_splat,
    emit_store,
    float32x16,
    splat_constant,
    splat_word,
)

_BYTES = ir.VectorType(I8, LANES)


@inlined
def scale_of(magnitude, most):
    """What integers up to `most` are multiples of, of numbers up to a magnitude, which a NaN makes
    one."""
    return np.float32(magnitude * (np.float32(1.0) / most))


@inlined
def inverse_of(magnitude, most):
    """What such numbers are multiplied by before they are rounded."""
    return most / magnitude if magnitude > np.float32(LEAST_MAGNITUDE) else np.float32(0.0)


@intrinsic
def store_bytes_of(typing_context, where, floats):
    """Rounds 16 floats to integers, ties to even, and stores their lowest bytes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        bytes_ = builder.trunc(_emit_rounded(builder, args[1]), _BYTES)
        emit_store(builder, bytes_, args[0], align=1)
        return context.get_dummy_value()

    return types.void(types.intp, float32x16), codegen


@intrinsic
def store_integers_of(typing_context, arithmetic, where, floats):
    """As `store_bytes_of`, but as `core.kernels.inputs` writes the integers of a product's inputs
    in this arithmetic."""
    in_pairs = arithmetic.arithmetic.widens_integers

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        _, where, floats = args
        emit_store_integers(builder, _emit_rounded(builder, floats), where, in_pairs=in_pairs)
        return context.get_dummy_value()

    return types.void(arithmetic, types.intp, float32x16), codegen


@intrinsic
def merge_bytes_of(typing_context, where, floats, number):
    """As `store_bytes_of`, but as byte `number` of 16 words, whose other bytes stay."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        where, floats, number = args
        shift = emit_splat(
            builder, builder.trunc(builder.shl(number, ir.Constant(number.type, 3)), I32)
        )
        mask = builder.shl(splat_word(0xFF), shift)
        byte = builder.and_(builder.shl(_emit_rounded(builder, floats), shift), mask)
        others = builder.and_(emit_load(builder, where, WORDS), builder.not_(mask))
        emit_store(builder, builder.or_(byte, others), where)
        return context.get_dummy_value()

    return types.void(types.intp, float32x16, types.intp), codegen


@intrinsic
def whole(typing_context, floats):
    """Rounds to integers, ties to even, up to 2 ** 22."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.fsub(builder.fadd(args[0], splat_constant(ROUNDER)), splat_constant(ROUNDER))

    return float32x16(float32x16), codegen


@intrinsic
def product_where_nonzero(typing_context, weights, others):
    """weights x others, and an exact 0 where a weight is 0, whatever the other is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        zero = splat_constant(0.0)
        is_nonzero = builder.fcmp_unordered("!=", args[0], zero)
        return builder.select(is_nonzero, builder.fmul(*args), zero)

    return float32x16(float32x16, float32x16), codegen


def _emit_rounded(builder: Any, floats: Any) -> Any:
    """Words whose lowest bytes are those of the nearest integers."""
    return builder.bitcast(builder.fadd(floats, splat_constant(ROUNDER)), WORDS)
