"""Which arithmetic the kernels use: a number format and the instructions that compute it.

Everything hot is stored in *words* of 32 bits: one float32, or two neighbouring
bfloat16 values, lower index in the lower half. A product step multiplies the elements of
a word and adds to float32 sums; so kernels of both formats differ only in what one step
does. The other operand, the *inputs* (activations, queries, attention weights), is float32,
but pairs of bfloat16 for the instruction that multiplies such pairs.

int8 is a format for the products with a model's weights, and, where an instruction multiplies
bytes, for attention and its cache; the rest is bf16 there. Each column of weights has a scale, and
each group of 64 inputs of a row; a word holds four of either; see
`core.kernels.linear.integer_tiles`, and for attention `core.kernels.attention.integer_tiles`.

int4 is int8 with weights as a file of 4 bits has them; matrices that have no 4 bits there are int8
beside it. See `core.kernels.linear.nibble_tiles` and `core.kernels.mixed`.

`Arithmetic` is a value that numba types by its content: kernels take it as their first
argument and are compiled once for each. (Kernels made by a factory would do as well,
but numba's disk cache misses closures at every start.)
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import (
    NativeValue,
    models,
    register_model,
    typeof_impl,
    unbox,
)

from core.kernels.compile import intrinsic
from core.kernels.host_cpu import caches_bytes

LANES = 16  # float32 values in a vector, and positions in a KV block
PANEL_COLUMNS = 64  # columns of a packed weight panel
NIBBLE_GROUP = 32  # inputs that share a scale and a minimum of weights of 4 bits
GROUP = 64  # inputs of a product that share a scale, where they have one; all sizes are multiples
MAX_TILE_ROWS = 6  # 6 rows x 4 vectors of sums, 4 of weights and 1 of inputs fill 32 registers
LOW_INTEGER_TILE_ROWS = 2  # sums of integers and of floats take twice as many registers
# 5 rows x 2 registers of 16-bit sums, 2 of weights and 1 of inputs.
NIBBLE_TILE_ROWS = 5
NIBBLE_TILE_COLUMNS = (64, 32)  # of tiles of one and of two rows; higher ones have 16
TALL_TILE_ROWS = 13  # 13 rows x 2 vectors of sums, 2 x 2 of widened weights and 1 of inputs, too

NUMBER_FORMATS = ("fp32", "bf16", "int8", "int4")
_ELEMENTS_PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}


@dataclass(frozen=True)
class Arithmetic:
    """A number format and the instructions for it.

    "avx512bf16" multiplies pairs of bfloat16; "avx512" and "portable" (whatever LLVM makes
    of vectors on the host) widen weights to float32 and differ only in the size of tiles.
    Sums of the first and the others differ, so `name` belongs to the numerics fingerprint.
    "avx512vnni" and "avx2" are for int8: the first multiplies four pairs of bytes and adds them to
    an int32, the second two pairs of 16 bits. All kinds of int8 compute the same bits, and so do
    those of int4, where "avx2" multiplies pairs of bytes and adds them to 16 bits.
    """

    number_format: str
    instructions: str
    # Of what is bf16 beside int8 and int4 weights; empty: the same.
    bf16_instructions: str = ""
    # Of int8, what the largest input of a group becomes: 64 beside matrices of 4 bits.
    largest_input: int = 127

    @property
    def name(self) -> str:
        beside = f"-{self.bf16_instructions}" if self.bf16_instructions else ""
        largest = "" if self.largest_input == 127 else f"-{self.largest_input}"
        return f"{self.number_format}-{self.instructions}{beside}{largest}"

    @property
    def is_integer(self) -> bool:
        """Whether products with weights are sums of integers."""
        return self.number_format in ("int8", "int4")

    @property
    def has_nibbles(self) -> bool:
        """Whether weights have 4 bits each, where the file has them so."""
        return self.number_format == "int4"

    @property
    def of_bytes(self) -> Arithmetic:
        """The arithmetic of matrices that have no 4 bits in the file."""
        if not self.has_nibbles:
            return self
        return Arithmetic("int8", self.instructions, self.bf16_instructions, largest_input=64)

    @property
    def unquantised(self) -> Arithmetic:
        """The arithmetic of all but the products with weights: attention, cache, embedding."""
        if not self.is_integer:
            return self
        return Arithmetic("bf16", self.bf16_instructions or self.instructions)

    @property
    def of_cache(self) -> Arithmetic:
        """The arithmetic of attention and of the KV cache."""
        if self.is_integer and caches_bytes(self.instructions):
            return Arithmetic("int8", self.instructions, self.bf16_instructions)
        return self.unquantised

    @property
    def cache_scale_bytes(self) -> int:
        """Bytes of the scales behind a head's keys, or values, of a block of the cache."""
        return 4 * LANES if self.is_integer else 0

    def cache_bytes(self, width: int) -> int:
        """Bytes of a head's keys, or values, in a block of the cache."""
        return LANES * width * self.element_bytes + self.cache_scale_bytes

    def query_bytes(self, width: int) -> int:
        """Bytes of a head of a query; of integers with their scale and their correction."""
        return width * self.input_bytes + (8 if self.is_integer else 0)

    @property
    def weight_block_bytes(self) -> int:
        """Bytes of a query's weights of a block of positions; of integers with their scale."""
        return LANES * self.input_bytes + (4 if self.is_integer else 0)

    @property
    def elements_per_word(self) -> int:
        return _ELEMENTS_PER_WORD[self.number_format]

    @property
    def element_bytes(self) -> int:
        return 4 // self.elements_per_word

    @property
    def has_many_registers(self) -> bool:
        """Whether there are 32 registers of 16 floats, not 16 of 8."""
        return self.instructions.startswith("avx512")

    @property
    def dots_pairs(self) -> bool:
        """Whether one instruction multiplies pairs of bfloat16."""
        return self.instructions == "avx512bf16"

    @property
    def input_bytes(self) -> int:
        """Bytes of an element of the inputs of a product, attention's among them."""
        if self.is_integer:
            return 2 if self.widens_integers else 1
        return 2 if self.dots_pairs else 4

    @property
    def widens_integers(self) -> bool:
        """Whether int8 inputs of a product lie as 16 bits each: AVX2 sums products of bytes in
        pairs, to 16 bits, which 2 x 255 x 64 fits and 2 x 255 x 127 does not."""
        return (self.number_format, self.instructions, self.largest_input) == ("int8", "avx2", 127)

    @property
    def input_group_bytes(self) -> int:
        """Bytes of a group of a product's inputs; of int8 with its scale and its correction,
        of int4 with its scale and its scaled sums."""
        if self.has_nibbles:
            return GROUP + 4 + 4 * (GROUP // NIBBLE_GROUP)
        if self.is_integer:
            return GROUP * self.input_bytes + 8
        return GROUP * self.input_bytes

    @property
    def weight_group_bytes(self) -> int:
        """Bytes of a group of inputs in a panel of weights; of int4 with float16 scales and
        minima."""
        if self.has_nibbles:
            return PANEL_COLUMNS * (GROUP // 2 + GROUP // NIBBLE_GROUP * 4)
        return PANEL_COLUMNS * GROUP * self.element_bytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of the columns' scales behind a panel of int8 weights."""
        return PANEL_COLUMNS * 4 if self.number_format == "int8" else 0

    def panel_bytes(self, num_inputs: int) -> int:
        """Bytes of a packed panel of weights."""
        return num_inputs // GROUP * self.weight_group_bytes + self.scale_bytes

    @property
    def most_tile_rows(self) -> int:
        """Rows of the highest register tile of a product."""
        if self.has_nibbles:
            return NIBBLE_TILE_ROWS
        if self.is_integer:
            return MAX_TILE_ROWS
        return TALL_TILE_ROWS if self.instructions == "avx512" else MAX_TILE_ROWS

    def tile_vectors(self, num_rows: int) -> int:
        """Vectors of columns that a register tile of a product spans.

        A CPU without AVX-512 has half as many registers of at most half the width. Tall tiles are
        narrow: they load and widen weights half as often for each row.
        """
        if not self.has_many_registers:
            return 1
        if self.is_integer:
            return 4 if num_rows <= LOW_INTEGER_TILE_ROWS else 2
        return 4 if num_rows <= MAX_TILE_ROWS else 2

    def tile_columns(self, num_rows: int) -> int:
        """Columns of a register tile of a product: the same for all heights of the tiles that
        rows beyond the highest are cut into."""
        if not self.has_nibbles:
            return self.tile_vectors(num_rows) * LANES
        return (*NIBBLE_TILE_COLUMNS, LANES)[min(num_rows - 1, len(NIBBLE_TILE_COLUMNS))]


class ArithmeticType(types.Opaque):
    """The numba type of one `Arithmetic`: known while compiling, nothing at run time."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        super().__init__(name=f"Arithmetic({arithmetic.name})")


register_model(ArithmeticType)(models.OpaqueModel)


@typeof_impl.register(Arithmetic)
def _type_of_arithmetic(value: Arithmetic, context: Any) -> ArithmeticType:
    return ArithmeticType(value)


@unbox(ArithmeticType)  # type: ignore[no-untyped-call]
def _unbox_arithmetic(numba_type: Any, value: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())  # type: ignore[no-untyped-call]


def _constant(value: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.IntType(64), value)

    return codegen


def _flag(value: bool) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(ir.IntType(1), int(value))

    return codegen


def _other_arithmetic(given: Any, other: Arithmetic) -> Any:
    """Signature and code of an intrinsic that turns one arithmetic into another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return context.get_dummy_value()

    return ArithmeticType(other)(given), codegen


@intrinsic
def elements_per_word(typing_context, arithmetic):
    """1 for fp32, 2 for bf16: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.elements_per_word)


@intrinsic
def element_bytes(typing_context, arithmetic):
    """4 for fp32, 2 for bf16: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.element_bytes)


@intrinsic
def input_bytes(typing_context, arithmetic):
    """Bytes of an element of a product's inputs: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.input_bytes)


@intrinsic
def cache_scale_bytes(typing_context, arithmetic):
    """Bytes of the scales of a head's keys, or values, in a block: a constant of the kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.cache_scale_bytes)


@intrinsic
def weight_block_bytes(typing_context, arithmetic):
    """Bytes of a query's weights of a block of positions: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.weight_block_bytes)


@intrinsic
def input_group_bytes(typing_context, arithmetic):
    """Bytes of 64 inputs of a product: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.input_group_bytes)


@intrinsic
def weight_group_bytes(typing_context, arithmetic):
    """Bytes of 64 inputs of a panel of weights: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.weight_group_bytes)


@intrinsic
def scale_bytes(typing_context, arithmetic):
    """Bytes of the columns' scales behind a panel: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.scale_bytes)


@intrinsic
def is_integer(typing_context, arithmetic):
    """Whether products with weights are sums of integers: a constant of the kernel."""
    return types.boolean(arithmetic), _flag(arithmetic.arithmetic.is_integer)


@intrinsic
def unquantised(typing_context, arithmetic):
    """The arithmetic of all but the products with weights."""
    return _other_arithmetic(arithmetic, arithmetic.arithmetic.unquantised)


@intrinsic
def of_cache(typing_context, arithmetic):
    """The arithmetic of attention and of the KV cache."""
    return _other_arithmetic(arithmetic, arithmetic.arithmetic.of_cache)


@intrinsic
def has_nibbles(typing_context, arithmetic):
    """Whether weights may have 4 bits each: a constant of the kernel."""
    return types.boolean(arithmetic), _flag(arithmetic.arithmetic.has_nibbles)


@intrinsic
def of_bytes(typing_context, arithmetic):
    """The arithmetic of matrices that have no 4 bits in the file."""
    return _other_arithmetic(arithmetic, arithmetic.arithmetic.of_bytes)


@intrinsic
def widens(typing_context, arithmetic):
    """Whether weights become float32 before they are multiplied: a constant of the kernel."""
    kind = arithmetic.arithmetic
    return types.boolean(arithmetic), _flag(kind.number_format == "bf16" and not kind.dots_pairs)


@intrinsic
def widened(typing_context, arithmetic):
    """The arithmetic of weights that have been widened to float32."""
    return _other_arithmetic(
        arithmetic, Arithmetic("fp32", arithmetic.arithmetic.unquantised.instructions)
    )


@intrinsic
def most_tile_rows(typing_context, arithmetic):
    """Rows of the highest register tile of a product: a constant of the compiled kernel."""
    return types.intp(arithmetic), _constant(arithmetic.arithmetic.most_tile_rows)


@intrinsic
def tile_columns(typing_context, arithmetic, num_rows):
    """Columns of a register tile of so many rows: 64, 32 or 16."""
    kind = arithmetic.arithmetic

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        found = ir.Constant(ir.IntType(64), kind.tile_columns(kind.most_tile_rows))
        for rows in range(kind.most_tile_rows - 1, 0, -1):
            is_low = builder.icmp_signed("<=", args[1], ir.Constant(args[1].type, rows))
            columns = ir.Constant(ir.IntType(64), kind.tile_columns(rows))
            found = builder.select(is_low, columns, found)
        return found

    return types.intp(arithmetic, types.intp), codegen
