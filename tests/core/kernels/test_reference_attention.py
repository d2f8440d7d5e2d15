"""The attention reference against dense attention of a contiguous cache."""

from __future__ import annotations

import numpy as np
import pytest

from core.kernels.attention import reference


def dense_attention(
    q_TND: np.ndarray, keys_TKD: np.ndarray, values_TKD: np.ndarray, window: int | None
) -> np.ndarray:
    """One sequence from position 0, with an explicit mask."""
    num_rows, num_heads, head_dim = q_TND.shape
    group_size = num_heads // keys_TKD.shape[1]
    out_TND = np.empty_like(q_TND)
    distance = np.arange(num_rows)[:, None] - np.arange(num_rows)[None, :]
    hidden = (distance < 0) | (distance >= (window or num_rows))
    for n in range(num_heads):
        scores = q_TND[:, n] @ keys_TKD[:, n // group_size].T / np.sqrt(head_dim)
        weights = np.exp(np.where(hidden, -np.inf, scores))
        out_TND[:, n] = weights / weights.sum(1, keepdims=True) @ values_TKD[:, n // group_size]
    return out_TND


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_paged_chunks_equal_dense_attention(window: int | None) -> None:
    random = np.random.default_rng(2)
    q = random.standard_normal((11, 4, 8)).astype(np.float32)
    k, v = (random.standard_normal((11, 2, 8)).astype(np.float32) for _ in range(2))
    block_table = np.array([[4, 1, 3]], np.int32)
    keys, values = (np.full((5, 4, 2, 8), np.nan, np.float32) for _ in range(2))
    positions = np.arange(11)
    keys[block_table[0, positions // 4], positions % 4] = k
    values[block_table[0, positions // 4], positions % 4] = v
    # The same sequence as three runs: two prefill chunks and a decode.
    out = reference.paged_attention(
        q,
        keys,
        values,
        block_tables_RC=np.repeat(block_table, 3, axis=0),
        first_positions_R=np.array([0, 6, 10], np.int32),
        num_rows_R=np.array([6, 4, 1], np.int32),
        window=window,
    )
    np.testing.assert_allclose(out, dense_attention(q, k, v, window), atol=1e-6)


def test_equal_keys_average_the_values() -> None:
    keys = np.ones((1, 4, 1, 2), np.float32)
    values = np.arange(8, dtype=np.float32).reshape(1, 4, 1, 2)
    out = reference.paged_attention(
        np.ones((1, 1, 2), np.float32),
        keys,
        values,
        block_tables_RC=np.zeros((1, 1), np.int32),
        first_positions_R=np.array([2], np.int32),
        num_rows_R=np.array([1], np.int32),
    )
    np.testing.assert_allclose(out, [[[2.0, 3.0]]])
