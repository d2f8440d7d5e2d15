"""CUDA norms against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from core.kernels.norm import cuda as kernels
from core.kernels.norm import reference
from tests.support.cuda import (
    THREADS,
    TOLERANCES,
    nans_on_device,
    needs_cuda,
    on_device,
    random_in_format,
    to_floats,
    to_format,
)

pytestmark = [pytest.mark.cuda, needs_cuda]
EPS = 1e-5


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 12), (1, 37)])
def test_rms_norm_equals_the_reference(shape: tuple[int, int], number_format: str) -> None:
    random = np.random.default_rng(1)
    x_TH = random_in_format(random, shape, number_format)
    weight_H = random.standard_normal(shape[1]).astype(np.float32)
    out_TH = nans_on_device(shape, number_format)
    kernels.rms_norm(
        on_device(x_TH),
        on_device(weight_H),
        out_TH,
        eps=EPS,
        number_format=number_format,
        threads=THREADS,
    )
    expected_TH = reference.rms_norm(to_floats(x_TH), weight_H, eps=EPS)
    np.testing.assert_allclose(
        to_floats(out_TH.copy_to_host()), expected_TH, atol=TOLERANCES[number_format], rtol=1e-2
    )


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_add_rms_norm_adds_in_place_and_norms_the_rounded_sum(number_format: str) -> None:
    random = np.random.default_rng(2)
    shape = (2, 21)
    x_TH, residual_TH = (random_in_format(random, shape, number_format) for _ in range(2))
    weight_H = random.standard_normal(shape[1]).astype(np.float32)
    sum_TH, out_TH = on_device(residual_TH), nans_on_device(shape, number_format)
    kernels.add_rms_norm(
        on_device(x_TH),
        sum_TH,
        on_device(weight_H),
        out_TH,
        eps=EPS,
        number_format=number_format,
        threads=THREADS,
    )
    expected_sum_TH = to_format(to_floats(x_TH) + to_floats(residual_TH), number_format)
    np.testing.assert_array_equal(sum_TH.copy_to_host(), expected_sum_TH)
    expected_TH = reference.rms_norm(to_floats(expected_sum_TH), weight_H, eps=EPS)
    np.testing.assert_allclose(
        to_floats(out_TH.copy_to_host()), expected_TH, atol=TOLERANCES[number_format], rtol=1e-2
    )
