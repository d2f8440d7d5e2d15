"""The exponential function of 16 float32 at once, to about one unit in the last place."""

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
