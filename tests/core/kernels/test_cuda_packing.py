"""CUDA gather and scatter against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from core.kernels.packing import cuda as kernels
from core.kernels.packing import reference
from tests.support.cuda import (
    LAUNCH,
    nans_on_device,
    needs_cuda,
    on_device,
    random_in_format,
    to_floats,
    to_format,
)

pytestmark = [pytest.mark.cuda, needs_cuda]


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_gathered_rows_are_those_of_the_index(number_format: str) -> None:
    source_SH = random_in_format(np.random.default_rng(6), (7, 11), number_format)
    indices_T = np.array([6, 0, 3, 3], np.int32)
    packed_TH = nans_on_device((4, 11), number_format)
    kernels.gather_rows(on_device(source_SH), on_device(indices_T), packed_TH, launch=LAUNCH)
    np.testing.assert_array_equal(
        packed_TH.copy_to_host(), reference.gather_rows(source_SH, indices_T)
    )


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_rows_gathered_and_widened_have_the_same_values(number_format: str) -> None:
    source_SH = random_in_format(np.random.default_rng(8), (5, 11), number_format)
    indices_T = np.array([4, 4, 1], np.int32)
    out_TH = nans_on_device((3, 11))
    kernels.gather_widened_rows(
        on_device(source_SH),
        on_device(indices_T),
        out_TH,
        number_format=number_format,
        launch=LAUNCH,
    )
    np.testing.assert_array_equal(out_TH.copy_to_host(), to_floats(source_SH)[indices_T])


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_scattered_rows_leave_the_others_alone(number_format: str) -> None:
    packed_TH = random_in_format(np.random.default_rng(7), (3, 9), number_format)
    indices_T = np.array([4, 1, 0], np.int32)
    target_SH = nans_on_device((6, 9), number_format)
    expected_SH = to_format(np.full((6, 9), np.nan, np.float32), number_format)
    reference.scatter_rows(packed_TH, indices_T, expected_SH)
    kernels.scatter_rows(on_device(packed_TH), on_device(indices_T), target_SH, launch=LAUNCH)
    np.testing.assert_array_equal(target_SH.copy_to_host(), expected_SH)
