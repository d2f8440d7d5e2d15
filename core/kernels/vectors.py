"""Vectors of 16 float32 for numba kernels: a type, and intrinsics that work on it.

Kernels written with these choose their order of summation themselves, where loops left
to the auto-vectoriser need fast-math, which lets the compiler choose it. Memory is
addressed by integers (`address`), with no alignment demanded.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from core.kernels.arithmetic import LANES
from core.kernels.compile import intrinsic

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
FLOATS = ir.VectorType(F32, LANES)
WORDS = ir.VectorType(I32, LANES)
HALVES = ir.VectorType(I16, LANES)
BYTES_OF_FLOATS = 4 * LANES


class Float32x16Type(types.Type):
    """16 float32 values in one vector."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


float32x16 = Float32x16Type()


@register_model(Float32x16Type)
class Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, FLOATS)  # type: ignore[no-untyped-call]


# Helpers that emit LLVM IR; `builder` is the function under construction.


def index(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat_constant(value: float) -> ir.Constant:
    return ir.Constant(FLOATS, [value] * LANES)


def splat_word(value: int) -> ir.Constant:
    return ir.Constant(WORDS, [value] * LANES)


def emit_load(builder: Any, address: Any, kind: Any, *, align: int = 4) -> ir.Value:
    """Loads a `kind` from an integer address."""
    return builder.load(builder.inttoptr(address, ir.PointerType()), align=align, typ=kind)


def emit_store(builder: Any, value: Any, address: Any, *, align: int = 4) -> None:
    """Stores `value` at an integer address."""
    builder.store(value, builder.inttoptr(address, ir.PointerType()), align=align)


def emit_splat(builder: Any, scalar: Any) -> ir.Value:
    """A vector with `scalar` in every lane."""
    kind = ir.VectorType(scalar.type, LANES)
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(WORDS, [0] * LANES))


def emit_call(builder: Any, name: str, result: Any, arguments: list[Any]) -> ir.Value:
    """Calls the LLVM intrinsic `name`."""
    function = builder.module.globals.get(name)
    if function is None:
        kinds = [argument.type for argument in arguments]
        function = ir.Function(builder.module, ir.FunctionType(result, kinds), name)
    return builder.call(function, arguments)


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> ir.Value:
    """a * b + c for vectors of floats, rounded once."""
    return emit_call(builder, "llvm.fma.v16f32", FLOATS, [a, b, c])


def _binary(operation: str) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return getattr(builder, operation)(*args)

    return codegen


# Intrinsics: what they do in kernels.


@intrinsic
def address(typing_context, array):
    """Address of an array's first element. The caller keeps the array alive."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, I64)

    return types.intp(array), codegen


@intrinsic
def load_floats(typing_context, where):
    """16 float32 from an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return emit_load(builder, args[0], FLOATS)

    return float32x16(types.intp), codegen


@intrinsic
def store_floats(typing_context, where, floats):
    """16 float32 to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        emit_store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.intp, float32x16), codegen


@intrinsic
def load_word(typing_context, where):
    """The 32-bit word at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return emit_load(builder, args[0], I32)

    return types.uint32(types.intp), codegen


@intrinsic
def store_word(typing_context, where, word):
    """A 32-bit word to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        emit_store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.uint32), codegen


@intrinsic
def load_float(typing_context, where):
    """The float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return emit_load(builder, args[0], F32)

    return types.float32(types.intp), codegen


@intrinsic
def store_float(typing_context, where, value):
    """A float32 to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        emit_store(builder, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@intrinsic
def splat(typing_context, scalar):
    """A vector with one float32 in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return emit_splat(builder, args[0])

    return float32x16(types.float32), codegen


@intrinsic
def add(typing_context, a, b):
    """a + b."""
    return float32x16(float32x16, float32x16), _binary("fadd")


@intrinsic
def subtract(typing_context, a, b):
    """a - b."""
    return float32x16(float32x16, float32x16), _binary("fsub")


@intrinsic
def multiply(typing_context, a, b):
    """a * b."""
    return float32x16(float32x16, float32x16), _binary("fmul")


@intrinsic
def divide(typing_context, a, b):
    """a / b."""
    return float32x16(float32x16, float32x16), _binary("fdiv")


@intrinsic
def fused_multiply_add(typing_context, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return emit_fma(builder, *args)

    return float32x16(float32x16, float32x16, float32x16), codegen


@intrinsic
def maximum(typing_context, a, b):
    """The greater of each lane; b where either is a NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return float32x16(float32x16, float32x16), codegen


@intrinsic
def lanes_at_least(typing_context, floats, least):
    """Which lanes are at least those of `least`: a bit each, the first lane's the lowest."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        lanes = builder.bitcast(builder.fcmp_ordered(">=", *args), I16)
        return builder.zext(lanes, I32)

    return types.uint32(float32x16, float32x16), codegen


@intrinsic
def trailing_zeros(typing_context, bits):
    """The number of the lowest bit that is set; there must be one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.zext(builder.cttz(args[0], ir.Constant(ir.IntType(1), 1)), I64)

    return types.intp(types.uint32), codegen


@intrinsic
def largest_lane(typing_context, floats):
    """The greatest of the 16 lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        def greater(a: Any, b: Any) -> ir.Value:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return _emit_fold(builder, args[0], greater)

    return types.float32(float32x16), codegen


@intrinsic
def sum_of_lanes(typing_context, floats):
    """The sum of the 16 lanes, by halving: always in the same order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return _emit_fold(builder, args[0], builder.fadd)

    return types.float32(float32x16), codegen


def _emit_fold(builder: Any, floats: Any, combine: Any) -> ir.Value:
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(floats.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                floats,
                undefined,
                ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes))),
            )
            for first in (0, lanes)
        )
        floats = combine(low, high)
    return builder.extract_element(floats, ir.Constant(I32, 0))
