"""Between vectors of float32 and what lies in memory: elements of a number format, and inputs.

See `core.kernels.arithmetic` for both.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from core.kernels.arithmetic import LANES
from core.kernels.compile import intrinsic
from core.kernels.vectors import (
    FLOATS,
    HALVES,
    WORDS,
    emit_call,
    emit_load,
    emit_splat,
    emit_store,
    float32x16,
    index,
    splat_word,
)


class BFloat16(ir.Type):
    """LLVM's `bfloat`, which llvmlite lacks; needed in the signatures of some instructions."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


def emit_bfloat16_halves(builder: Any, arithmetic: Any, floats: Any) -> ir.Value:
    """Rounds to bfloat16, nearest even; the bits. A NaN stays a (quiet) NaN.

    The instruction turns subnormal numbers into zeros, as the one that multiplies pairs does.
    """
    if arithmetic.dots_pairs:
        name, kind = "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat16(), LANES)
        return builder.bitcast(emit_call(builder, name, kind, [floats]), HALVES)
    bits = builder.bitcast(floats, WORDS)
    high = builder.lshr(bits, splat_word(16))
    odd = builder.and_(high, splat_word(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, splat_word(0x7FFF))), splat_word(16))
    # The rounding step alone would turn some NaNs into zero.
    is_nan = builder.fcmp_unordered("uno", floats, floats)
    bits = builder.select(is_nan, builder.or_(high, splat_word(0x40)), rounded)
    return builder.trunc(bits, HALVES)


def emit_bfloat16_bits(builder: Any, arithmetic: Any, floats: Any) -> ir.Value:
    """Rounds to bfloat16; the bits, in the low halves of 32-bit lanes."""
    return builder.zext(emit_bfloat16_halves(builder, arithmetic, floats), WORDS)


def emit_store_elements(builder: Any, arithmetic: Any, address: Any, floats: Any) -> None:
    """Stores 16 neighbouring elements in the number format."""
    if arithmetic.number_format == "bf16":
        floats = emit_bfloat16_halves(builder, arithmetic, floats)
    emit_store(builder, floats, address, align=arithmetic.element_bytes)


def emit_store_inputs(builder: Any, arithmetic: Any, address: Any, floats: Any) -> None:
    """Stores 16 neighbouring inputs of a product: as bfloat16 where pairs are multiplied."""
    if arithmetic.dots_pairs:
        emit_store_elements(builder, arithmetic, address, floats)
    else:
        emit_store(builder, floats, address)


def _emit_load_bfloat16(builder: Any, address: Any) -> ir.Value:
    """16 neighbouring bfloat16, as floats."""
    bits = builder.zext(emit_load(builder, address, HALVES, align=2), WORDS)
    return builder.bitcast(builder.shl(bits, splat_word(16)), FLOATS)


@intrinsic
def load_elements(typing_context, arithmetic, where):
    """16 neighbouring elements in the number format, widened to float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if arithmetic.arithmetic.number_format == "fp32":
            return emit_load(builder, args[1], FLOATS)
        return _emit_load_bfloat16(builder, args[1])

    return float32x16(arithmetic, types.intp), codegen


@intrinsic
def store_elements(typing_context, arithmetic, where, floats):
    """16 neighbouring elements, rounded to the number format."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        emit_store_elements(builder, arithmetic.arithmetic, args[1], args[2])
        return context.get_dummy_value()

    return types.void(arithmetic, types.intp, float32x16), codegen


@intrinsic
def store_inputs(typing_context, arithmetic, where, floats):
    """16 neighbouring inputs of a product: rounded to bfloat16 where pairs are multiplied."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        emit_store_inputs(builder, arithmetic.arithmetic, args[1], args[2])
        return context.get_dummy_value()

    return types.void(arithmetic, types.intp, float32x16), codegen


@intrinsic
def load_inputs(typing_context, arithmetic, where):
    """16 neighbouring inputs of a product, as `store_inputs` left them, widened to float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if arithmetic.arithmetic.dots_pairs:
            return _emit_load_bfloat16(builder, args[1])
        return emit_load(builder, args[1], FLOATS)

    return float32x16(arithmetic, types.intp), codegen


@intrinsic
def merge_elements(typing_context, arithmetic, where, floats, half):
    """Rounds 16 elements into the lower (`half` 0) or upper (1) half of 16 words.

    Writing the lower half clears the upper one. fp32 words have no halves.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        _, where, floats, half = args
        if arithmetic.arithmetic.number_format == "fp32":
            emit_store(builder, floats, where)
            return context.get_dummy_value()
        bits = emit_bfloat16_bits(builder, arithmetic.arithmetic, floats)
        lower = builder.and_(emit_load(builder, where, WORDS), splat_word(0xFFFF))
        both = builder.or_(lower, builder.shl(bits, splat_word(16)))
        is_upper = emit_splat(builder, builder.icmp_unsigned("!=", half, index(0)))
        emit_store(builder, builder.select(is_upper, both, bits), where)
        return context.get_dummy_value()

    return types.void(arithmetic, types.intp, float32x16, types.intp), codegen


@intrinsic
def round_elements(typing_context, arithmetic, floats):
    """Rounds to what the number format can hold."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        if arithmetic.arithmetic.number_format == "fp32":
            return args[1]
        bits = emit_bfloat16_bits(builder, arithmetic.arithmetic, args[1])
        return builder.bitcast(builder.shl(bits, splat_word(16)), FLOATS)

    return float32x16(arithmetic, float32x16), codegen


@intrinsic
def widen_words(typing_context, where, lower, upper):
    """Splits 16 words of bfloat16 pairs into 16 float32 at `lower` and 16 at `upper`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        words = emit_load(builder, args[0], WORDS)
        emit_store(builder, builder.shl(words, splat_word(16)), args[1])
        emit_store(builder, builder.and_(words, splat_word(0xFFFF0000)), args[2])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen
