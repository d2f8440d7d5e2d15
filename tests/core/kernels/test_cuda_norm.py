"""CUDA norms against the reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.norm import cuda as kernels
from core.kernels.norm import reference
from tests.support.cuda import (
    LAUNCH,
    TOLERANCES,
    nans_on_device,
    needs_cuda,
    on_device,
    to_floats,
    to_format,
)

pytestmark = [pytest.mark.cuda, needs_cuda]
EPS = 1e-5
SHAPE = (2, 21)


def random_rows(seed: int, *, count: int) -> list[npt.NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(SHAPE).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 12), (1, 37)])
def test_rms_norm_equals_the_reference(shape: tuple[int, int], number_format: str) -> None:
    random = np.random.default_rng(1)
    x_TH = random.standard_normal(shape).astype(np.float32)
    weight_H = random.standard_normal(shape[1]).astype(np.float32)
    out_TH = nans_on_device(shape, number_format)
    kernels.rms_norm(
        on_device(x_TH),
        on_device(weight_H),
        out_TH,
        eps=EPS,
        number_format=number_format,
        launch=LAUNCH,
    )
    expected_TH = reference.rms_norm(x_TH, weight_H, eps=EPS)
    np.testing.assert_allclose(
        to_floats(out_TH.copy_to_host()), expected_TH, atol=TOLERANCES[number_format], rtol=1e-2
    )


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_add_rms_norm_adds_in_place_and_norms_the_sum(number_format: str, rounds: bool) -> None:
    residual_TH, added_TH = random_rows(2, count=2)
    bias_H, weight_H = random_rows(3, count=1)[0]
    sum_TH, out_TH = on_device(residual_TH), nans_on_device(SHAPE, number_format)
    kernels.add_rms_norm(
        sum_TH,
        on_device(added_TH),
        on_device(bias_H),
        on_device(weight_H),
        out_TH,
        eps=EPS,
        number_format=number_format,
        rounds=rounds,
        launch=LAUNCH,
    )
    expected_sum_TH = residual_TH + (added_TH + bias_H)
    if rounds:
        expected_sum_TH = to_floats(to_format(expected_sum_TH, "bf16"))
    np.testing.assert_array_equal(sum_TH.copy_to_host(), expected_sum_TH)
    expected_TH = reference.rms_norm(expected_sum_TH, weight_H, eps=EPS)
    np.testing.assert_allclose(
        to_floats(out_TH.copy_to_host()), expected_TH, atol=TOLERANCES[number_format], rtol=1e-2
    )


@pytest.mark.parametrize("rounds", [False, True])
def test_add_computes_the_same_sum_as_add_rms_norm(rounds: bool) -> None:
    residual_TH, added_TH = random_rows(4, count=2)
    bias_H = random_rows(5, count=1)[0][0]
    sum_TH, other_TH = on_device(residual_TH), on_device(residual_TH)
    added, bias = on_device(added_TH), on_device(bias_H)
    kernels.add(sum_TH, added, bias, rounds=rounds, launch=LAUNCH)
    kernels.add_rms_norm(
        other_TH,
        added,
        bias,
        bias,
        nans_on_device(SHAPE),
        eps=EPS,
        number_format="fp32",
        rounds=rounds,
        launch=LAUNCH,
    )
    np.testing.assert_array_equal(sum_TH.copy_to_host(), other_TH.copy_to_host())
