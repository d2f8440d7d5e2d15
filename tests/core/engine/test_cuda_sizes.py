"""Which numbers of rows and splits get graphs of their own."""

from __future__ import annotations

import pytest

from core.engine.cuda_backend import row_sizes, split_sizes
from core.kernels.attention.cuda import SPLIT


@pytest.mark.parametrize("most", [1, 2, 7, 8, 48, 100, 512])
def test_every_number_of_rows_fits_a_size_and_small_ones_waste_less_than_half(most: int) -> None:
    sizes = row_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size < 2 * count


@pytest.mark.parametrize("num_positions", [1, SPLIT, SPLIT + 1, 5 * SPLIT, 32_768])
def test_the_longest_sequence_fits_the_last_number_of_splits(num_positions: int) -> None:
    sizes = split_sizes(num_positions)
    assert sizes == sorted(set(sizes))
    assert (sizes[-1] - 1) * SPLIT < num_positions <= sizes[-1] * SPLIT
