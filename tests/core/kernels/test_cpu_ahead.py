"""What products fetch for attention: the blocks that it reads, whole, and no others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.ahead import (
    AHEAD_SIZE,
    FIRST_BLOCK,
    MOST_BLOCKS,
    MOST_BYTES,
    NUM_BLOCKS,
    begin_layer,
    end_layer,
    is_due,
    list_blocks,
    next_piece,
)
from core.kernels.attention.cpu import RowTable

EVERYTHING = 1 << 40
CACHE = 1 << 20  # address of a layer's cache; nothing is read there
BLOCK_BYTES = 12288


def listed(
    slots: list[int],
    positions: list[int],
    *,
    rows: slice = slice(0, None),
    window: int = EVERYTHING,
    block_bytes: int = BLOCK_BYTES,
) -> npt.NDArray[np.int64]:
    """The `ahead` array for these rows, whose sequence s has the blocks 1000 s, 1000 s + 1, ..."""
    tables_SB = (1000 * np.arange(8)[:, None] + np.arange(500)).astype(np.int32)
    ahead = np.full(AHEAD_SIZE, -1, np.int64)
    table = RowTable(
        len(slots),
        np.array(slots, np.int32),
        np.array(positions, np.int32),
        tables_SB.ctypes.data,
        tables_SB.strides[0],
    )
    first, end, _ = rows.indices(len(slots))
    list_blocks(table, first, end, window, block_bytes, ahead)
    assert not is_due(ahead)
    return ahead


def blocks_of(ahead: npt.NDArray[np.int64]) -> list[int]:
    blocks: list[int] = ahead[FIRST_BLOCK : FIRST_BLOCK + ahead[NUM_BLOCKS]].tolist()
    return blocks


def test_blocks_are_those_of_each_run_in_order() -> None:
    ahead = listed([2, 5, 5, 5, 1], [33, 14, 15, 16, 0])
    assert blocks_of(ahead) == [2000, 2001, 2002, 5000, 5001, 1000]


def test_a_member_lists_the_blocks_of_its_own_rows() -> None:
    assert blocks_of(listed([2, 5, 5, 1], [3, 14, 15, 0], rows=slice(1, 3))) == [5000]
    assert blocks_of(listed([2], [3], rows=slice(0, 0))) == []


def test_blocks_that_no_row_sees_are_left_out() -> None:
    assert blocks_of(listed([3], [100], window=20)) == [3005, 3006]


def test_where_the_caches_cannot_hold_all_blocks_the_first_ones_are_listed() -> None:
    quarter = MOST_BYTES // 4
    first_four = [1000, 1001, 2000, 2001]
    assert blocks_of(listed([1, 2], [31, 20], block_bytes=quarter)) == first_four
    assert blocks_of(listed([1, 2], [31, 40], block_bytes=quarter)) == first_four
    assert blocks_of(listed([1, 2], [31, 499 * 16], block_bytes=quarter)) == first_four
    assert blocks_of(listed([1, 2], [31, 40], block_bytes=MOST_BYTES + 1)) == []
    assert len(blocks_of(listed([1, 2], [499 * 16] * 2, block_bytes=64))) == 1000
    many = blocks_of(listed([1, 2, 3], [499 * 16] * 3, block_bytes=64))
    assert many == [1000 * (1 + at // 500) + at % 500 for at in range(MOST_BLOCKS)]


@pytest.mark.parametrize("num_tiles", [12, 13, 60, 1782])
@pytest.mark.parametrize("num_rows", [153, 288])
def test_pieces_cover_as_much_of_the_blocks_as_there_is_time_for(
    num_tiles: int, num_rows: int
) -> None:
    ahead = listed([2, 5], [90, 90])
    blocks = blocks_of(ahead)
    begin_layer(ahead, CACHE, num_tiles, num_rows)
    lines = set[int]()
    for _ in range(num_tiles):
        if is_due(ahead):
            where, step = next_piece(ahead, num_rows)
            assert 0 < step <= 64
            lines.update(((where + step * np.arange(num_rows)) // 64).tolist())
    wanted = {
        (CACHE + block * BLOCK_BYTES) // 64 + line
        for block in blocks
        for line in range(BLOCK_BYTES // 64)
    }
    if num_tiles * num_rows < len(wanted):  # more than a line for each row of weights
        assert is_due(ahead)
    else:
        assert not is_due(ahead)
        assert wanted <= lines


def test_after_the_last_layer_nothing_is_due() -> None:
    ahead = listed([2], [90])
    begin_layer(ahead, CACHE, 100, 153)
    assert is_due(ahead)
    end_layer(ahead)
    assert not is_due(ahead)


def test_no_rows_have_nothing_due() -> None:
    ahead = listed([], [])
    begin_layer(ahead, CACHE, 0, 153)
    assert not is_due(ahead)
