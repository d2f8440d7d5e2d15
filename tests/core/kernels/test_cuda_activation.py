"""CUDA gated SiLU against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from core.kernels.activation import cuda as kernels
from core.kernels.activation import reference
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


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_silu_multiply_equals_the_reference(number_format: str) -> None:
    random = np.random.default_rng(3)
    shape = (2, 13)
    gate_TF, up_TF = (random_in_format(random, shape, number_format) for _ in range(2))
    out_TF = nans_on_device(shape, number_format)
    kernels.silu_multiply(
        on_device(gate_TF), on_device(up_TF), out_TF, number_format=number_format, threads=THREADS
    )
    expected_TF = reference.silu_multiply(to_floats(gate_TF), to_floats(up_TF))
    np.testing.assert_allclose(
        to_floats(out_TF.copy_to_host()), expected_TF, atol=TOLERANCES[number_format], rtol=1e-2
    )


def test_silu_of_huge_gates_neither_overflows_nor_vanishes() -> None:
    gate_TF = np.array([[-1e30, -200.0, 0.0, 200.0, 1e30]], np.float32)
    out_TF = nans_on_device(gate_TF.shape)
    kernels.silu_multiply(
        on_device(gate_TF),
        on_device(to_format(np.ones_like(gate_TF), "fp32")),
        out_TF,
        number_format="fp32",
        threads=THREADS,
    )
    np.testing.assert_array_equal(out_TF.copy_to_host(), np.maximum(gate_TF, 0.0))
