"""Packing: rows of several sequences, of ragged number, into one micro-batch and back.

A micro-batch is dense; where its rows lie elsewhere is an index: `row_indices` makes it from
runs, `gather_rows` packs, `scatter_rows` unpacks.

Letters: R runs, T packed rows, S rows elsewhere, H elements in a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
Rows = npt.NDArray[Any]


def row_indices(first_rows_R: IntArray, num_rows_R: IntArray) -> IntArray:
    """Index of every row of every run, in order; a run is `num_rows` rows from its first."""
    runs = [
        np.arange(first, first + num_rows, dtype=np.int32)
        for first, num_rows in zip(first_rows_R, num_rows_R, strict=True)
    ]
    return np.concatenate([np.empty(0, np.int32), *runs])


def last_rows(num_rows_R: IntArray) -> IntArray:
    """Index of the last row of every run within the packed micro-batch."""
    return (np.cumsum(num_rows_R) - 1).astype(np.int32)


def gather_rows(source_SH: Rows, indices_T: IntArray) -> Rows:
    """Row t of the result is row `indices_T[t]` of the source."""
    return source_SH[indices_T]


def scatter_rows(packed_TH: Rows, indices_T: IntArray, target_SH: Rows) -> None:
    """Writes row t to row `indices_T[t]` of the target, in place; indices are distinct."""
    target_SH[indices_T] = packed_TH
