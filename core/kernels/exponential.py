"""Exponential functions of 16 float32 at once, to about one unit in the last place."""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir

from core.kernels.compile import intrinsic
from core.kernels.vectors import (
    FLOATS,
    WORDS,
    emit_call,
    emit_fma,
    float32x16,
    splat_constant,
    splat_word,
)

# ln 2 in two parts, the first with trailing zero bits, so that n * LN2_HIGH is exact (Cody and
# Waite, Software Manual for the Elementary Functions, 1980, chapter 6).
_LN2_HIGH = 0.693359375
_LN2_LOW = float(np.float32(math.log(2) - 0.693359375))
_LOG2_E = float(np.float32(math.log2(math.e)))
# exp(r) = 1 + r + r^2 P(r) on |r| <= ln(2) / 2; minimax coefficients of Cephes' expf.
_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LEAST, _GREATEST = -87.33654, 88.02969  # between them 2^n is a normal float32

# 2^f = 1 + f P(f) on |f| <= 0.5, a least-maximum fit of the relative error (9e-8).
_POWER_COEFFICIENTS = (
    1.326472731307149e-3,
    9.671512991189957e-3,
    5.550733581185341e-2,
    2.4022242426872253e-1,
    6.931470036506653e-1,
    1.0,
)
# Added to a small number, rounds it to an integer, whose exponent as of 2^n are the lowest bits.
_ROUNDING = 1.5 * 2**23 + 127
_LEAST_POWER = -127.0


def _float32(value: float) -> ir.Constant:
    return splat_constant(float(np.float32(value)))


@intrinsic
def exponential(typing_context, floats):
    """exp of every lane: exactly 0 below -87.3 (subnormal results), clamped above 88; NaN stays."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        x = args[0]
        clamped = builder.select(
            builder.fcmp_ordered("<", x, _float32(_LEAST)), _float32(_LEAST), x
        )
        clamped = builder.select(
            builder.fcmp_ordered(">", clamped, _float32(_GREATEST)), _float32(_GREATEST), clamped
        )
        scaled = builder.fmul(clamped, _float32(_LOG2_E))
        n = emit_call(builder, "llvm.rint.v16f32", FLOATS, [scaled])
        r = emit_fma(builder, n, _float32(-_LN2_HIGH), clamped)
        r = emit_fma(builder, n, _float32(-_LN2_LOW), r)
        polynomial: ir.Value = _float32(_COEFFICIENTS[0])
        for coefficient in _COEFFICIENTS[1:]:
            polynomial = emit_fma(builder, polynomial, r, _float32(coefficient))
        squared = builder.fmul(r, r)
        result = builder.fadd(emit_fma(builder, polynomial, squared, r), _float32(1.0))
        exponent = builder.shl(
            builder.add(builder.fptosi(n, WORDS), splat_word(127)), splat_word(23)
        )
        result = builder.fmul(result, builder.bitcast(exponent, FLOATS))
        return builder.select(builder.fcmp_ordered("<", x, _float32(_LEAST)), _float32(0.0), result)

    return float32x16(float32x16), codegen


@intrinsic
def power_of_two(typing_context, floats):
    """2 to the power of every lane, which must be below 127.

    Exactly 0 below -126.5 (subnormal results), minus infinity included; NaN stays.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        least = _float32(_LEAST_POWER)
        x = builder.select(builder.fcmp_ordered("<", args[0], least), least, args[0])
        shifted = builder.fadd(x, _float32(_ROUNDING))
        fraction = builder.fsub(x, builder.fsub(shifted, _float32(_ROUNDING)))
        result: ir.Value = _float32(_POWER_COEFFICIENTS[0])
        for coefficient in _POWER_COEFFICIENTS[1:]:
            result = emit_fma(builder, result, fraction, _float32(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, WORDS), splat_word(23))
        return builder.fmul(result, builder.bitcast(exponent, FLOATS))

    return float32x16(float32x16), codegen
