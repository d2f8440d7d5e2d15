"""The references that work on whole rows: norm, gated SiLU, linear."""

from __future__ import annotations

import numpy as np

from core.kernels.activation.reference import silu_multiply
from core.kernels.linear.reference import linear
from core.kernels.norm.reference import add_rms_norm, rms_norm


def test_a_normed_row_has_a_root_mean_square_of_one() -> None:
    x = np.random.default_rng(3).standard_normal((4, 32)).astype(np.float32) * 50
    normed = rms_norm(x, np.ones(32, np.float32), eps=0.0)
    np.testing.assert_allclose(np.sqrt((normed**2).mean(axis=1)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(normed / x, (normed / x)[:, :1].repeat(32, axis=1), rtol=1e-5)


def test_a_norm_scales_by_its_weight_and_eps_guards_zero_rows() -> None:
    weight = np.array([1.0, 2.0], np.float32)
    np.testing.assert_allclose(
        rms_norm(np.array([[3.0, 3.0], [0.0, 0.0]], np.float32), weight, eps=1e-6),
        [[1.0, 2.0], [0.0, 0.0]],
        rtol=1e-6,
    )


def test_add_rms_norm_returns_the_sum_and_its_norm() -> None:
    random = np.random.default_rng(4)
    x, residual = (random.standard_normal((2, 8)).astype(np.float32) for _ in range(2))
    weight = random.standard_normal(8).astype(np.float32)
    added = add_rms_norm(x, residual, weight, eps=1e-5)
    np.testing.assert_array_equal(added.sum_TH, x + residual)
    np.testing.assert_array_equal(added.normed_TH, rms_norm(x + residual, weight, eps=1e-5))


def test_silu_has_its_known_values_and_limits() -> None:
    gate = np.array([[0.0, 1.0, -1.0, 1e4, -1e4]], np.float32)
    expected = [[0.0, 0.7310586 * 2, -0.26894143 * 2, 2e4, 0.0]]
    np.testing.assert_allclose(silu_multiply(gate, np.full_like(gate, 2.0)), expected, rtol=1e-6)


def test_linear_is_a_product_with_the_transposed_weight_plus_bias() -> None:
    x, weight = np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 4.0], [5.0, 6.0]], np.float32)
    np.testing.assert_array_equal(linear(x, weight), [[11.0, 17.0]])
    np.testing.assert_array_equal(
        linear(x, weight, np.array([0.5, -1.0], np.float32)), [[11.5, 16.0]]
    )
