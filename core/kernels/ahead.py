"""Fetches what attention is going to read while products, which compute, leave memory idle.

Keys and values of many sequences lie in blocks all over the memory, and attention waits longer for
them than it computes. So the tiles of the products that come before it ask for them: each takes a
piece, and asks for a part of that with each row of weights that it multiplies.
"""

# numba infers the types of kernels and intrinsics.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from core.kernels.attention.cpu import rows_of_run, table_of_row, visible_blocks
from core.kernels.compile import kernel
from core.kernels.vectors import load_word

LINE = 64  # bytes of a cache line
# What is fetched but not read yet has to stay in a core's own caches: to fetch more costs more than
# it saves (measured with a second-level cache of 1 MB).
MOST_BYTES = 2 << 20
MOST_BLOCKS = 1024
# What an `ahead` array (int64) has: address of the block at hand and where in it the next piece
# begins; bytes for each row of weights; how many blocks have begun, of how many; bytes of a block;
# address of the layer's cache; then the numbers of the blocks.
BLOCK, OFFSET, RATE, NUM_BEGUN, NUM_BLOCKS, BLOCK_BYTES, CACHE, FIRST_BLOCK = range(8)
AHEAD_SIZE = FIRST_BLOCK + MOST_BLOCKS


@kernel
def list_blocks(rows, first, end, window, block_bytes, ahead):
    """Notes which blocks the rows from `first` on and before `end` read, in the order of attention:
    the first ones, as many as the caches have room for. `rows` is a RowTable.

    One layer's take `block_bytes` each; a row sees `window` positions. Nothing is fetched yet.
    """
    most = min(MOST_BLOCKS, MOST_BYTES // block_bytes)
    count = 0
    row = first
    while row < end and count < most:
        num_rows = rows_of_run(rows, row)
        position = np.int64(rows.positions_T[row])
        blocks = visible_blocks(table_of_row(rows, row), position, num_rows, window, 0, block_bytes)
        for index in range(min(blocks.num_blocks, most - count)):
            ahead[FIRST_BLOCK + count] = np.int64(load_word(blocks.table + index * 4))
            count += 1
        row += num_rows
    ahead[NUM_BLOCKS] = count
    ahead[BLOCK_BYTES] = block_bytes
    end_layer(ahead)


@kernel
def begin_layer(ahead, cache, num_tiles, num_rows):
    """From now on the blocks of the layer whose cache is at the address `cache` are fetched, spread
    over so many tiles of `num_rows` rows of weights each."""
    num_blocks, size = ahead[NUM_BLOCKS], ahead[BLOCK_BYTES]
    if num_blocks == 0:
        return
    fewest = (size + LINE * num_rows - 1) // (LINE * num_rows)  # pieces of a block
    num_pieces = max(fewest, num_tiles // num_blocks)
    ahead[RATE] = (size + num_pieces * num_rows - 1) // (num_pieces * num_rows)
    ahead[CACHE] = cache
    ahead[NUM_BEGUN] = 0
    begin_block(ahead)


@kernel
def begin_block(ahead):
    """The next piece is the first one of the next block."""
    number = ahead[NUM_BEGUN]
    ahead[BLOCK] = ahead[CACHE] + ahead[FIRST_BLOCK + number] * ahead[BLOCK_BYTES]
    ahead[OFFSET] = 0
    ahead[NUM_BEGUN] = number + 1


@kernel
def end_layer(ahead):
    """Nothing more is fetched."""
    ahead[NUM_BEGUN] = ahead[NUM_BLOCKS]
    ahead[OFFSET] = ahead[BLOCK_BYTES]


@kernel
def is_due(ahead):
    """Whether anything is left to be fetched."""
    return ahead[OFFSET] < ahead[BLOCK_BYTES] or ahead[NUM_BEGUN] < ahead[NUM_BLOCKS]


@kernel
def next_piece(ahead, num_rows):
    """Address of the piece for a tile of `num_rows` rows of weights, and its bytes for each row.

    At a block's end it goes on beyond it. There must be something due.
    """
    if ahead[OFFSET] >= ahead[BLOCK_BYTES]:
        begin_block(ahead)
    where = ahead[BLOCK] + ahead[OFFSET]
    ahead[OFFSET] += ahead[RATE] * num_rows
    return where, ahead[RATE]
