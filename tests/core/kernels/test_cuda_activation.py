"""CUDA gated SiLU against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from core.kernels.activation import cuda as kernels
from core.kernels.activation import reference
from tests.support.cuda import (
    LAUNCH,
    TOLERANCES,
    nans_on_device,
    needs_cuda,
    on_device,
    to_floats,
)

pytestmark = [pytest.mark.cuda, needs_cuda]


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_silu_multiply_with_biases_equals_the_reference(number_format: str) -> None:
    random = np.random.default_rng(3)
    gate_up_T2F = random.standard_normal((2, 26)).astype(np.float32)
    bias_2F = random.standard_normal(26).astype(np.float32)
    out_TF = nans_on_device((2, 13), number_format)
    kernels.silu_multiply(
        on_device(gate_up_T2F),
        on_device(bias_2F),
        out_TF,
        number_format=number_format,
        launch=LAUNCH,
    )
    biased_T2F = gate_up_T2F + bias_2F
    expected_TF = reference.silu_multiply(biased_T2F[:, :13].copy(), biased_T2F[:, 13:].copy())
    np.testing.assert_allclose(
        to_floats(out_TF.copy_to_host()), expected_TF, atol=TOLERANCES[number_format], rtol=1e-2
    )


def test_silu_of_huge_gates_neither_overflows_nor_vanishes() -> None:
    gate_F = np.array([-1e30, -200.0, 0.0, 200.0, 1e30], np.float32)
    out_TF = nans_on_device((1, 5))
    kernels.silu_multiply(
        on_device(np.concatenate([gate_F, np.ones(5, np.float32)])[None]),
        on_device(np.zeros(10, np.float32)),
        out_TF,
        number_format="fp32",
        launch=LAUNCH,
    )
    np.testing.assert_array_equal(out_TF.copy_to_host()[0], np.maximum(gate_F, 0.0))
