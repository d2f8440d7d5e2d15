"""A row of the residual stream in blocks: its integers, then the scale of each block.

An element is the integer times its block's scale. Integers are int8 from -127 to 127; -128 stands
for what is not finite. Scales are bfloat16, little endian. The last block may be short.

Letters: T rows, W bytes of a row, B blocks of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 32  # elements that share a scale
MOST = 127  # of an integer's magnitude
NOT_FINITE = -128
SCALE_BYTES = 2
INFINITY_BITS = 0x7F80  # as a bfloat16: from here on bits are no finite number, or have a sign


def num_blocks(size: int) -> int:
    """Blocks of a row of so many elements."""
    return -(-size // BLOCK)


def row_bytes(size: int) -> int:
    """Bytes of a row of so many elements."""
    return size + SCALE_BYTES * num_blocks(size)


def num_elements(size_bytes: int) -> int:
    """Elements of a row of so many bytes."""
    return size_bytes - SCALE_BYTES * -(-size_bytes // (BLOCK + SCALE_BYTES))


def scale_bits(rows_TW: npt.NDArray[np.uint8], *, size: int) -> npt.NDArray[Any]:
    """The scales of rows of so many elements, as bit patterns [T, B]."""
    return np.ascontiguousarray(rows_TW[:, size:]).view("<u2")
