"""Causal attention over a paged KV cache (Kwon et al. 2023, "Efficient Memory Management for
Large Language Model Serving with PagedAttention"), with grouped heads (Ainslie et al. 2023)
and an optional sliding window. A prefill chunk and a decode step are the same operation.

Letters: R runs (one sequence each), T rows of all runs, N query heads, K KV heads (N is a
multiple of K; query head n reads KV head n // (N / K)), D elements in a head, B blocks of
the cache, P positions in a block, C blocks in the longest block table.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


def paged_attention(
    q_TND: FloatArray,
    keys_BPKD: FloatArray,
    values_BPKD: FloatArray,
    *,
    block_tables_RC: IntArray,
    first_positions_R: IntArray,
    num_rows_R: IntArray,
    window: int | None = None,
) -> FloatArray:
    """Attends from every row to the positions up to its own, its own included.

    Run r is the rows after those of run r - 1; its first row is at `first_positions_R[r]`, and
    position p of its sequence lies in block `block_tables_RC[r, p // P]`, at p % P. With a
    window, a row sees that many positions, its own included. Scores are scaled by D ** -0.5.
    """
    out_TND = np.full_like(q_TND, np.nan)
    row = 0
    for table_C, first, num_rows in zip(
        block_tables_RC, first_positions_R, num_rows_R, strict=True
    ):
        for position in range(first, first + num_rows):
            start = 0 if window is None else max(0, position + 1 - window)
            seen = np.arange(start, position + 1)
            blocks, offsets = table_C[seen // keys_BPKD.shape[1]], seen % keys_BPKD.shape[1]
            out_TND[row] = attend(
                q_TND[row], keys_BPKD[blocks, offsets], values_BPKD[blocks, offsets]
            )
            row += 1
    return out_TND


def attend(q_ND: FloatArray, keys_SKD: FloatArray, values_SKD: FloatArray) -> FloatArray:
    """Softmax attention of one row over the S positions given."""
    group_size = q_ND.shape[0] // keys_SKD.shape[1]
    keys_SND = np.repeat(keys_SKD, group_size, axis=1).astype(np.float64)
    values_SND = np.repeat(values_SKD, group_size, axis=1).astype(np.float64)
    scores_NS = np.einsum("nd,snd->ns", q_ND, keys_SND) / math.sqrt(q_ND.shape[1])
    weights_NS = np.exp(scores_NS - scores_NS.max(axis=1, keepdims=True))
    weights_NS /= weights_NS.sum(axis=1, keepdims=True)
    return np.einsum("ns,snd->nd", weights_NS, values_SND).astype(np.float32)
