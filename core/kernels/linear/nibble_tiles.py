"""The register tile of a product of weights of 4 bits and int8 inputs.

A weight is d q + m, with q from 0 to 15 and d and m of the column's group of 32 inputs. So a group
adds (s d) x (the sum of q x the inputs' integers) + m x (s x the sum of the integers) to a float32
sum, where s is the inputs' scale; the sums of integers are exact.

Of each row of inputs, a group of 64 lies as 64 bytes, the scale, and for each half of it the scale
x the sum of the integers; all three float32. Of each panel of weights, 32 inputs lie as 4 rows of
64 words, 4 bytes in the lower nibbles of each word and the next 4 in the upper ones, and then, for
each 8 columns, as 8 float16 of d and 8 of m.

AVX2 multiplies four unsigned bytes by four signed ones into two sums of 16 bits, which saturate
only beyond 32,767: the 8 words of a group reach 8 x 2 x 15 x 127 = 30,480.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from core.kernels.arithmetic import GROUP, NIBBLE_GROUP, Arithmetic
from core.kernels.tiles import (
    PANEL_ROW_BYTES,
    Fetches,
    emit_for_rows,
    emit_loop,
    emit_row_addresses,
)
from core.kernels.vectors import F32, I8, I16, I32, emit_call, emit_load, emit_store, index

NIBBLE_ROWS = NIBBLE_GROUP // 8  # rows of words with two times four inputs
GROUP_ROWS = NIBBLE_ROWS + 1  # and one of scales and minima
SCALE_COLUMNS = 8  # whose d lie together, and then their m
SCALE = GROUP  # offsets within a group of inputs
SCALED_SUMS = GROUP + 4
_PARTS = GROUP // NIBBLE_GROUP


def emit_nibble_tiles(
    builder: Any,
    kind: Arithmetic,
    fetches: Fetches,
    num_rows: Any,
    inputs: Any,
    input_stride: Any,
    weights: Any,
    num_inputs: Any,
    bias: Any,
    outputs: Any,
    output_stride: Any,
    accumulates: Any,
) -> None:
    """Code for a tile of any number of rows; see `core.kernels.linear.tiles.product_tile`."""
    num_groups = builder.udiv(num_inputs, index(NIBBLE_GROUP))
    is_new = builder.icmp_signed("==", accumulates, index(0))
    vector = _Vector(builder, kind)

    def emit(rows: int) -> None:
        count = kind.tile_columns(rows) // vector.lanes
        input_rows = emit_row_addresses(builder, inputs, input_stride, rows)
        targets = [
            vector.addresses(row, count)
            for row in emit_row_addresses(builder, outputs, output_stride, rows)
        ]
        _emit_start(vector, is_new, vector.addresses(bias, count), targets)

        def add_group(group: Any, nothing: list[Any]) -> list[Any]:
            whole = builder.mul(builder.udiv(group, index(_PARTS)), index(kind.input_group_bytes))
            part = builder.urem(group, index(_PARTS))
            at = builder.add(whole, builder.mul(part, index(NIBBLE_GROUP)))
            rows_before = builder.mul(group, index(GROUP_ROWS))
            panel = builder.add(weights, builder.mul(rows_before, index(PANEL_ROW_BYTES)))
            integers = [builder.add(row, at) for row in input_rows]
            sums = _emit_sums(vector, integers, panel, rows_before, fetches, count)
            at = builder.add(whole, builder.mul(part, index(4)))
            scales = [
                (
                    builder.add(row, builder.add(whole, index(SCALE))),
                    builder.add(row, builder.add(at, index(SCALED_SUMS))),
                )
                for row in input_rows
            ]
            last = builder.add(panel, index(NIBBLE_ROWS * PANEL_ROW_BYTES))
            _emit_scaled(vector, scales, last, sums, targets)
            return nothing

        emit_loop(builder, num_groups, [], add_group)

    emit_for_rows(builder, num_rows, emit, most=kind.most_tile_rows)


@dataclass(frozen=True)
class _Vector:
    """Emits code for vectors that fill a register: of 8 columns for AVX2, of 16 else."""

    builder: Any
    kind: Arithmetic

    @property
    def lanes(self) -> int:
        return 8 if self.kind.instructions == "avx2" else 16

    def of(self, element: Any, *, per_lane: int = 1) -> ir.VectorType:
        return ir.VectorType(element, self.lanes * per_lane)

    def constant(self, element: Any, value: float, *, per_lane: int = 1) -> ir.Constant:
        return ir.Constant(self.of(element, per_lane=per_lane), [value] * self.lanes * per_lane)

    def load(self, where: Any, element: Any) -> Any:
        return emit_load(self.builder, where, self.of(element))

    def splat(self, where: Any, element: Any) -> Any:
        """What lies at an address, in every lane."""
        kind = self.of(element)
        undefined = ir.Constant(kind, ir.Undefined)
        scalar = emit_load(self.builder, where, element)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, undefined, self.constant(I32, 0))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return emit_call(self.builder, f"llvm.fma.v{self.lanes}f32", self.of(F32), [a, b, c])

    def addresses(self, start: Any, count: int) -> list[Any]:
        return [self.builder.add(start, index(4 * self.lanes * number)) for number in range(count)]


def _emit_start(vector: _Vector, is_new: Any, biases: list[Any], targets: list[list[Any]]) -> None:
    """The float sums, which lie in the outputs' own memory: registers hold those of integers."""
    builder = vector.builder
    for row in targets:
        for bias, at in zip(biases, row, strict=True):
            before = builder.select(is_new, vector.constant(F32, 0.0), vector.load(at, F32))
            emit_store(builder, builder.fadd(vector.load(bias, F32), before), at)


def _emit_sums(
    vector: _Vector, rows: list[Any], panel: Any, rows_before: Any, fetches: Fetches, count: int
) -> list[list[Any]]:
    """The integer sums of 32 inputs, row by row: int32 in each lane."""
    builder = vector.builder
    avx2 = vector.kind.instructions == "avx2"
    zero = vector.constant(I16, 0, per_lane=2) if avx2 else vector.constant(I32, 0)

    def add_row(number: Any, flat: list[Any]) -> list[Any]:
        num_lines = -(-count * vector.lanes // 16)
        fetches.emit(builder, builder.add(rows_before, number), num_lines)
        at = builder.add(panel, builder.mul(number, index(PANEL_ROW_BYTES)))
        words = [vector.load(where, I32) for where in vector.addresses(at, count)]
        inputs = [builder.add(row, builder.mul(number, index(8))) for row in rows]
        for part in range(2):
            shifted = [builder.lshr(w, vector.constant(I32, 4)) if part else w for w in words]
            weights = [builder.and_(w, vector.constant(I32, 0x0F0F0F0F)) for w in shifted]
            results: list[Any] = []
            for where in inputs:
                values = vector.splat(builder.add(where, index(4 * part)), I32)
                for weight in weights:
                    results.append(_emit_dot(vector, flat[len(results)], weight, values))
            flat = results
        return flat

    flat = emit_loop(builder, index(NIBBLE_ROWS), [zero] * (count * len(rows)), add_row)
    whole = [_emit_whole(vector, value) for value in flat]
    return [whole[first : first + count] for first in range(0, len(whole), count)]


def _emit_dot(vector: _Vector, sums: Any, weights: Any, inputs: Any) -> Any:
    """sums + weights . inputs, where a word of weights is four unsigned bytes, one of inputs four
    signed ones. For AVX2 sums are two of 16 bits in each lane."""
    builder, instructions = vector.builder, vector.kind.instructions
    if instructions == "avx2":
        pairs, kind = vector.of(I16, per_lane=2), vector.of(I8, per_lane=4)
        operands = [builder.bitcast(words, kind) for words in (weights, inputs)]
        return builder.add(sums, emit_call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, operands))
    if instructions == "avx512vnni":
        name = "llvm.x86.avx512.vpdpbusd.512"
        return emit_call(builder, name, vector.of(I32), [sums, weights, inputs])
    for shift in (0, 8, 16, 24):
        weight = builder.lshr(weights, vector.constant(I32, shift))
        weight = builder.and_(weight, vector.constant(I32, 0xFF))
        value = builder.shl(inputs, vector.constant(I32, 24 - shift))
        value = builder.ashr(value, vector.constant(I32, 24))
        sums = builder.add(sums, builder.mul(weight, value))
    return sums


def _emit_whole(vector: _Vector, sums: Any) -> Any:
    """Sums as int32."""
    if vector.kind.instructions != "avx2":
        return sums
    operands = [sums, vector.constant(I16, 1, per_lane=2)]
    return emit_call(vector.builder, "llvm.x86.avx2.pmadd.wd", vector.of(I32), operands)


def _emit_scaled(
    vector: _Vector,
    rows: list[tuple[Any, Any]],
    scales: Any,
    sums: list[list[Any]],
    targets: list[list[Any]],
) -> None:
    """Adds a group's sums, scaled, to what lies in `targets`. `rows` are the addresses of the
    inputs' scales and scaled sums."""
    builder = vector.builder
    for number, where in enumerate(vector.addresses(scales, len(targets[0]))):
        d, m = _emit_scales(vector, where)
        for (scale_at, sum_at), row_sums, row_targets in zip(rows, sums, targets, strict=True):
            scale, scaled_sum = vector.splat(scale_at, F32), vector.splat(sum_at, F32)
            total = vector.load(row_targets[number], F32)
            whole = builder.sitofp(row_sums[number], vector.of(F32))
            total = vector.fma(whole, builder.fmul(scale, d), total)
            emit_store(builder, vector.fma(m, scaled_sum, total), row_targets[number])


def _emit_scales(vector: _Vector, where: Any) -> list[Any]:
    """d and m of the columns of a vector, widened."""
    builder = vector.builder
    halves = ir.VectorType(ir.HalfType(), 2 * vector.lanes)
    both = emit_load(builder, where, halves)
    found = []
    for first in (0, SCALE_COLUMNS):
        lanes = [
            2 * SCALE_COLUMNS * (lane // SCALE_COLUMNS) + first + lane % SCALE_COLUMNS
            for lane in range(vector.lanes)
        ]
        some = builder.shuffle_vector(both, both, ir.Constant(vector.of(I32), lanes))
        found.append(builder.fpext(some, vector.of(F32)))
    return found
