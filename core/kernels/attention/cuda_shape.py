"""How the threads of a block of CUDA attention share its heads, keys and values."""

from __future__ import annotations

from typing import NamedTuple

from core.kernels.cuda_launch import ceil_div
from core.kernels.cuda_numbers import number_format_of

THREADS = 128
# A thread holds at most so many elements of queries, and so many words of keys and of values.
MOST_QUERIES = 32
MOST_WORDS = 16
# Lanes that read a key side by side: 64 bytes of it in one go.
FEWEST_LANES = 8
# Partial scores of a block are kept for so many pairs of a lane and a head.
MOST_LANE_HEADS = 96
WARP = 32


class Shape(NamedTuple):
    """How a block shares its work: heads of a block, lanes a key, threads a row of values."""

    heads: int
    lanes: int
    columns: int


def block_shape(
    num_words: int, group_size: int, number_format: str, *, num_threads: int = THREADS
) -> Shape:
    """As many heads of a group in one block as registers and shared memory allow."""
    per_word = number_format_of(number_format).per_word
    most_lanes = min(_power_of_two(num_words), WARP, num_threads)
    for turns in range(1, group_size + 1):
        heads = ceil_div(group_size, turns)
        wanted = _power_of_two(ceil_div(num_words * per_word * heads, MOST_QUERIES))
        lanes = min(max(wanted, FEWEST_LANES), most_lanes)
        if wanted <= lanes and lanes * heads <= MOST_LANE_HEADS:
            break
    return Shape(heads, lanes, columns=most_lanes)


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()
