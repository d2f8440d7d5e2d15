"""CUDA rotary embedding with KV write against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from core.kernels.rotary import cuda as kernels
from core.kernels.rotary import reference
from tests.support.cuda import (
    THREADS_XY,
    TOLERANCES,
    nans_on_device,
    needs_cuda,
    on_device,
    random_in_format,
    to_floats,
)

pytestmark = [pytest.mark.cuda, needs_cuda]


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_rotated_heads_and_written_cache_equal_the_reference(number_format: str) -> None:
    random = np.random.default_rng(4)
    num_rows, num_heads, num_kv_heads, head_dim = 3, 4, 2, 6
    q_TND = random_in_format(random, (num_rows, num_heads, head_dim), number_format)
    k_TKD, v_TKD = (
        random_in_format(random, (num_rows, num_kv_heads, head_dim), number_format)
        for _ in range(2)
    )
    positions_T, block_ids_T = np.array([5, 6, 17], np.int32), np.array([2, 2, 0], np.int32)
    tables = reference.rotary_tables(
        head_dim=head_dim, theta=10000.0, scaling=None, num_positions=32
    )
    cache_shape = (3, 4, num_kv_heads, head_dim)
    keys_BPKD, values_BPKD = (nans_on_device(cache_shape, number_format) for _ in range(2))
    out_TND = nans_on_device(q_TND.shape, number_format)
    kernels.rotate_and_write(
        on_device(q_TND),
        on_device(k_TKD),
        on_device(v_TKD),
        positions_T=on_device(positions_T),
        block_ids_T=on_device(block_ids_T),
        cos_LF=on_device(tables.cos_LF),
        sin_LF=on_device(tables.sin_LF),
        keys_BPKD=keys_BPKD,
        values_BPKD=values_BPKD,
        out_TND=out_TND,
        number_format=number_format,
        threads=THREADS_XY,
    )
    expected_keys, expected_values = (np.full(cache_shape, np.nan, np.float32) for _ in range(2))
    expected_TND = reference.rotate_and_write(
        to_floats(q_TND),
        to_floats(k_TKD),
        to_floats(v_TKD),
        positions_T=positions_T,
        block_ids_T=block_ids_T,
        tables=tables,
        keys_BPKD=expected_keys,
        values_BPKD=expected_values,
    )
    tolerance = TOLERANCES[number_format]
    for actual, expected in [
        (out_TND, expected_TND),
        (keys_BPKD, expected_keys),
        (values_BPKD, expected_values),
    ]:
        # NaN equals NaN here: what was not written must still be NaN.
        np.testing.assert_allclose(
            to_floats(actual.copy_to_host()), expected, atol=tolerance, rtol=1e-2
        )
