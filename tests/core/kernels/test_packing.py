"""Packing ragged rows into a micro-batch and back."""

from __future__ import annotations

import numpy as np

from core.kernels.packing import cpu
from core.kernels.packing.reference import gather_rows, last_rows, row_indices, scatter_rows


def test_runs_become_an_index_of_their_rows_in_order() -> None:
    indices = row_indices(np.array([7, 0, 3], np.int32), np.array([2, 1, 3], np.int32))
    np.testing.assert_array_equal(indices, [7, 8, 0, 3, 4, 5])
    assert indices.dtype == np.int32


def test_no_runs_become_an_empty_index() -> None:
    assert row_indices(np.empty(0, np.int32), np.empty(0, np.int32)).shape == (0,)


def test_last_rows_are_those_that_a_token_is_sampled_after() -> None:
    np.testing.assert_array_equal(last_rows(np.array([2, 1, 3], np.int32)), [1, 2, 5])


def test_scattering_gathered_rows_puts_each_back() -> None:
    source = np.random.default_rng(5).standard_normal((9, 4)).astype(np.float32)
    indices = np.array([8, 2, 5], np.int32)
    target = np.full_like(source, np.nan)
    scatter_rows(gather_rows(source, indices), indices, target)
    np.testing.assert_array_equal(target[indices], source[indices])
    assert np.isnan(np.delete(target, indices, axis=0)).all()


def test_the_cpu_scatters_what_it_gathers_back_to_its_place() -> None:
    source_SG = np.arange(7 * 64, dtype=np.float32).reshape(7, 64)
    indices_T = np.array([6, 1, 4], np.int32)
    packed_TG = np.full((3, 64), np.nan, np.float32)
    cpu.gather_rows(source_SG, indices_T, 3, packed_TG)
    np.testing.assert_array_equal(packed_TG, gather_rows(source_SG, indices_T))
    result_SG = np.full((7, 64), np.nan, np.float32)
    expected_SG = result_SG.copy()
    cpu.scatter_rows(packed_TG, indices_T, 3, result_SG)
    scatter_rows(packed_TG, indices_T, expected_SG)
    np.testing.assert_array_equal(result_SG, expected_SG)
