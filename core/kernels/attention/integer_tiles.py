"""Register tiles of attention over keys and values of 8 bits.

Keys and values have a scale for each position and head, queries one for each head, and a query's
weights one for each block of positions, so that small weights beside large ones elsewhere are not
lost. Sums of products within a head's elements, and within a block's positions, are of exact
integers. (Scores as in SageAttention, Zhang et al. 2024.)

The instruction that multiplies bytes wants one operand unsigned: keys are stored with 128 added,
which the correction of a query takes back, and weights are never negative. AVX2 multiplies pairs of
16 bits: queries and weights lie so (see `core.kernels.inputs`), keys and values become so in
registers, in tiles of as few sums as those have room for.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.kernels.arithmetic import LANES, Arithmetic
from core.kernels.tiles import WORD_BYTES, emit_loop, emit_prefetch, emit_word_products
from core.kernels.vectors import (
    BYTES_OF_FLOATS,
    F32,
    FLOATS,
    I32,
    WORDS,
    emit_fma,
    emit_load,
    emit_splat,
    emit_store,
    index,
    splat_constant,
    splat_word,
)

_WORDS_PER_BLOCK = LANES // 4  # of values
# Vectors of sums that fit the registers, as integers and as floats, beside what they are made of.
_MOST_SUMS = 12


def emit_integer_scores(
    builder: Any,
    kind: Arithmetic,
    num_pairs: Any,
    rows: list[tuple[Any, Any]],
    blocks: list[tuple[Any, Any, int]],
) -> None:
    """Scores of queries with blocks: addresses of a query and its scores, and of a block's keys,
    what is fetched meanwhile, and the block's number. A head has `num_pairs` pairs of words."""
    num_words = builder.shl(num_pairs, index(1))
    queries = [row for row, _ in rows]
    size = builder.mul(num_words, index(WORD_BYTES * kind.input_bytes))
    ends = [builder.add(row, size) for row in queries]

    def body(step: Any, sums: list[Any]) -> list[Any]:
        for parity in range(2):
            word = builder.add(builder.shl(step, index(1)), index(parity))
            offset = builder.mul(word, index(BYTES_OF_FLOATS))
            for _, fetched, _ in blocks:
                emit_prefetch(builder, builder.add(fetched, offset), 1)
            keys = [emit_load(builder, builder.add(at, offset), WORDS) for at, _, _ in blocks]
            sums = emit_word_products(builder, kind, queries, word, keys, sums)
        return sums

    corrections = [
        emit_splat(builder, emit_load(builder, builder.add(end, index(4)), I32)) for end in ends
    ]
    sums = emit_loop(
        builder, num_pairs, [correction for correction in corrections for _ in blocks], body
    )
    behind = builder.mul(num_words, index(BYTES_OF_FLOATS))
    for _, fetched, _ in blocks:
        emit_prefetch(builder, builder.add(fetched, behind), 1)
    scales = [emit_load(builder, builder.add(at, behind), FLOATS) for at, _, _ in blocks]
    for number, ((_, score_row), end) in enumerate(zip(rows, ends, strict=True)):
        of_query = emit_splat(builder, emit_load(builder, end, F32))
        for block, (_, _, place) in enumerate(blocks):
            whole = builder.sitofp(sums[number * len(blocks) + block], FLOATS)
            score = builder.fmul(builder.fmul(whole, scales[block]), of_query)
            emit_store(builder, score, builder.add(score_row, index(BYTES_OF_FLOATS * place)))


def emit_integer_values(
    builder: Any,
    kind: Arithmetic,
    rows: list[tuple[Any, Any]],
    vectors: int,
    num_words: Any,
    value_stride: Any,
    block_at: Callable[[Any], Any],
    fetched_at: Callable[[Any], Any],
) -> None:
    """Weighted sums of values: addresses of a row's weights and of its outputs, the number of
    vectors of elements; where the values of a block begin, and where what is fetched beside it."""
    num_blocks = builder.lshr(builder.add(num_words, index(_WORDS_PER_BLOCK - 1)), index(2))
    most = max(1, _MOST_SUMS // len(rows)) if kind.has_many_registers else 1
    for first in range(0, vectors, most):
        offsets = [
            index(BYTES_OF_FLOATS * vector) for vector in range(first, min(first + most, vectors))
        ]
        _emit_some_values(
            builder, kind, rows, offsets, num_blocks, value_stride, block_at, fetched_at
        )


def _emit_some_values(
    builder: Any,
    kind: Arithmetic,
    rows: list[tuple[Any, Any]],
    offsets: list[Any],
    num_blocks: Any,
    value_stride: Any,
    block_at: Callable[[Any], Any],
    fetched_at: Callable[[Any], Any],
) -> None:
    def body(block: Any, sums: list[Any]) -> list[Any]:
        values, fetched = block_at(block), fetched_at(block)
        start = builder.mul(block, index(kind.weight_block_bytes))
        weights = [builder.add(row, start) for row, _ in rows]
        wholes = [splat_word(0)] * len(sums)
        for word in range(_WORDS_PER_BLOCK):
            down = builder.mul(value_stride, index(word))
            elements = []
            for offset in offsets:
                place = builder.add(down, offset)
                emit_prefetch(builder, builder.add(fetched, place), 1)
                elements.append(emit_load(builder, builder.add(values, place), WORDS))
            wholes = emit_word_products(
                builder, kind, weights, index(word), elements, wholes, signed=True
            )
        behind = builder.mul(value_stride, index(_WORDS_PER_BLOCK))
        emit_prefetch(builder, builder.add(fetched, behind), 1)
        results: list[Any] = []
        for at in weights:
            end = builder.add(at, index(LANES * kind.input_bytes))
            scale = emit_splat(builder, emit_load(builder, end, F32))
            for _ in offsets:
                whole = builder.sitofp(wholes[len(results)], FLOATS)
                results.append(emit_fma(builder, whole, scale, sums[len(results)]))
        return results

    zero = splat_constant(0.0)
    sums = emit_loop(builder, num_blocks, [zero] * (len(rows) * len(offsets)), body)
    targets = [builder.add(row, offset) for _, row in rows for offset in offsets]
    for value, at in zip(sums, targets, strict=True):
        emit_store(builder, value, at)
