"""Register tiles of attention: scores and weighted values, as LLVM intrinsics for numba.

A tile multiplies some queries with keys or values, and meanwhile asks for as much memory as it
reads: asked for all at once, lines would wait for each other and the products for them.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, TypeVar

from numba import types

from core.kernels.arithmetic import LANES, Arithmetic
from core.kernels.attention.integer_tiles import emit_integer_scores, emit_integer_values
from core.kernels.compile import intrinsic
from core.kernels.tiles import (
    emit_dot,
    emit_for_rows,
    emit_inputs,
    emit_loop,
    emit_prefetch,
    emit_row_addresses,
    emit_weights,
)
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    I32,
    I64,
    emit_load,
    emit_store,
    index,
    splat_constant,
)


@intrinsic
def scores_tile(
    typing_context,
    arithmetic,
    num_rows,
    queries,
    query_stride,
    keys_0,
    keys_1,
    num_words,
    scores,
    score_stride,
    fetched_0,
    fetched_1,
):
    """Scores of 1 to 6 queries with the keys of two blocks, 32 float32 for each query.

    A block's keys are `num_words` (even) rows of 16 words, one word for each position. Even and
    odd words are summed apart, for shorter chains of dependent additions. As many bytes from
    `fetched_0` and `fetched_1` on are fetched.
    """
    kind = arithmetic.arithmetic

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, num_rows, queries, query_stride, keys_0, keys_1, num_words, *rest = args
        scores, score_stride, *fetched = rest
        num_pairs = builder.lshr(num_words, index(1))

        def emit(rows: int) -> None:
            query_rows = emit_row_addresses(builder, queries, query_stride, rows)
            score_rows = emit_row_addresses(builder, scores, score_stride, rows)
            blocks = list(zip((keys_0, keys_1), fetched, (0, 1), strict=True))
            emit_some = emit_integer_scores if kind.is_integer else _emit_scores
            for some_rows in _shares(list(zip(query_rows, score_rows, strict=True)), kind, most=3):
                for some_blocks in _shares(blocks, kind, most=1):
                    emit_some(builder, kind, num_pairs, some_rows, some_blocks)

        emit_for_rows(builder, num_rows, emit)
        return context.get_dummy_value()

    return types.void(arithmetic, *[types.intp] * 10), codegen


@intrinsic(prefer_literal=True)
def values_tile(
    typing_context,
    arithmetic,
    num_rows,
    vectors,
    weights,
    weight_stride,
    block_table,
    num_words,
    values,
    block_stride,
    value_stride,
    outputs,
    output_stride,
    fetched_table,
    fetched_values,
    last_fetched,
):
    """Weighted sums of values for 1 to 6 rows of weights and 16 x `vectors` (a literal) elements.

    `weights` has rows in the input format, an element for each position from the first of the
    block that `block_table` points at; `num_words` words of values belong to them. A block's
    values are 16 (fp32), 8 (bf16) or 4 (int8) rows of words, `value_stride` apart. From each block
    of another table, as far as number `last_fetched`, as many bytes are fetched.
    """
    kind = arithmetic.arithmetic
    count = vectors.literal_value
    words_per_block = LANES // kind.elements_per_word

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, num_rows, _, weights, weight_stride, block_table, num_words, values, *rest = args
        block_stride, value_stride, outputs, output_stride, *fetched = rest
        fetched_table, fetched_values, last_fetched = fetched

        def block_address(table: Any, entry: Any, start: Any) -> Any:
            where = builder.add(table, builder.mul(entry, index(4)))
            block = builder.sext(emit_load(builder, where, I32), I64)
            return builder.add(start, builder.mul(block, block_stride))

        def values_of(entry: Any) -> Any:
            return block_address(block_table, entry, values)

        def fetched_beside(entry: Any) -> Any:
            is_last = builder.icmp_signed(">", entry, last_fetched)
            entry = builder.select(is_last, last_fetched, entry)
            return block_address(fetched_table, entry, fetched_values)

        def emit(rows: int) -> None:
            weight_rows = emit_row_addresses(builder, weights, weight_stride, rows)
            output_rows = emit_row_addresses(builder, outputs, output_stride, rows)
            for some_rows in _shares(
                list(zip(weight_rows, output_rows, strict=True)), kind, most=3
            ):
                if kind.is_integer:
                    emit_integer_values(
                        builder, kind, some_rows, count, num_words, value_stride, values_of,
                        fetched_beside,
                    )  # fmt: skip
                    continue
                for some_vectors in _shares(list(range(count)), kind, most=2):
                    emit_some(some_rows, some_vectors)

        def emit_some(some_rows: list[tuple[Any, Any]], some_vectors: list[int]) -> None:
            offsets = [index(BYTES_OF_FLOATS * vector) for vector in some_vectors]

            def body(step: Any, sums: list[Any]) -> list[Any]:
                entry = builder.lshr(step, index(words_per_block.bit_length() - 1))
                in_block = builder.and_(step, index(words_per_block - 1))
                offset = builder.mul(in_block, value_stride)
                ahead = builder.add(fetched_beside(entry), offset)
                row = builder.add(values_of(entry), offset)
                elements = []
                for vector in offsets:
                    emit_prefetch(builder, builder.add(ahead, vector), 1)
                    elements.append(emit_weights(builder, kind, builder.add(row, vector)))
                results: list[Any] = []
                for weight_row, _ in some_rows:
                    weight = emit_inputs(builder, kind, weight_row, step)
                    for element in elements:
                        results.append(emit_dot(builder, kind, sums[len(results)], weight, element))
                return results

            zero = splat_constant(0.0)
            sums = emit_loop(builder, num_words, [zero] * (len(some_rows) * len(offsets)), body)
            targets = [builder.add(row, vector) for _, row in some_rows for vector in offsets]
            for value, at in zip(sums, targets, strict=True):
                emit_store(builder, value, at)

        emit_for_rows(builder, num_rows, emit)
        return context.get_dummy_value()

    return types.void(arithmetic, types.intp, vectors, *[types.intp] * 12), codegen


def _emit_scores(
    builder: Any,
    kind: Arithmetic,
    num_pairs: Any,
    rows: list[tuple[Any, Any]],
    blocks: list[tuple[Any, Any, int]],
) -> None:
    """Scores of queries with blocks: addresses of a query and its scores, and of a block's keys,
    what is fetched meanwhile, and the block's number."""

    def body(step: Any, sums: list[Any]) -> list[Any]:
        results = list(sums)
        for parity in range(2):
            word = builder.add(builder.mul(step, index(2)), index(parity))
            offset = builder.mul(word, index(BYTES_OF_FLOATS))
            for _, fetched, _ in blocks:
                emit_prefetch(builder, builder.add(fetched, offset), 1)
            keys = [emit_weights(builder, kind, builder.add(at, offset)) for at, _, _ in blocks]
            for number, (query_row, _) in enumerate(rows):
                query = emit_inputs(builder, kind, query_row, word)
                for block, key in enumerate(keys):
                    at = (number * len(blocks) + block) * 2 + parity
                    results[at] = emit_dot(builder, kind, sums[at], query, key)
        return results

    zero = splat_constant(0.0)
    sums = emit_loop(builder, num_pairs, [zero] * (len(rows) * len(blocks) * 2), body)
    for number, (_, score_row) in enumerate(rows):
        for block, (_, _, place) in enumerate(blocks):
            first = (number * len(blocks) + block) * 2
            score = builder.fadd(sums[first], sums[first + 1])
            emit_store(builder, score, builder.add(score_row, index(BYTES_OF_FLOATS * place)))


Item = TypeVar("Item")


def _shares(items: list[Item], kind: Arithmetic, *, most: int) -> list[list[Item]]:
    """What is computed at a time: everything, but at most so much where registers are few."""
    if kind.has_many_registers:
        return [items]
    return [items[first : first + most] for first in range(0, len(items), most)]
