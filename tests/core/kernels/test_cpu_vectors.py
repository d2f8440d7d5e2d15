"""Elementwise CPU kernels against numpy, with outputs that start as NaN."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.activation.cpu import silu_multiply_panel
from core.kernels.activation.reference import silu_multiply
from core.kernels.arithmetic import Arithmetic
from core.kernels.compile import kernel
from core.kernels.exponential import exponential, power_of_two
from core.kernels.memory import aligned_zeros
from core.kernels.norm.cpu import norm_rows
from core.kernels.norm.reference import rms_norm
from core.kernels.packing.cpu import (
    gather_rows,
    gather_widened_rows,
    narrow_rows,
    widen_rows,
)
from core.kernels.vectors import load_floats, store_floats
from tests.support.arithmetics import host_arithmetics, inputs_to_floats

each_arithmetic = pytest.mark.parametrize("arithmetic", host_arithmetics(), ids=lambda a: a.name)


@kernel
def _exponentials(source, count, target):  # type: ignore[no-untyped-def]
    for vector in range(count):
        store_floats(target + vector * 64, exponential(load_floats(source + vector * 64)))


def exponentials(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    result = np.full_like(values, np.nan)
    _exponentials(values.ctypes.data, len(values) // 16, result.ctypes.data)
    return result


@kernel
def _powers_of_two(source, count, target):  # type: ignore[no-untyped-def]
    for vector in range(count):
        store_floats(target + vector * 64, power_of_two(load_floats(source + vector * 64)))


def powers_of_two(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    result = np.full_like(values, np.nan)
    _powers_of_two(values.ctypes.data, len(values) // 16, result.ctypes.data)
    return result


def element_type(arithmetic: Arithmetic) -> type[np.generic]:
    return np.uint16 if arithmetic.number_format == "bf16" else np.float32


def test_the_exponential_is_accurate_to_two_units_in_the_last_place() -> None:
    values = np.linspace(-87.3, 88.0, 1_600_000, dtype=np.float32)
    expected = np.exp(values.astype(np.float64))
    error = np.abs(exponentials(values) - expected) / expected
    assert error.max() < 2 * np.finfo(np.float32).eps


def test_the_exponential_knows_its_limits() -> None:
    values = np.array([-np.inf, -200, -87.4, 0, np.nan, np.inf, 200, -0.0] * 2, np.float32)
    result = exponentials(values)
    np.testing.assert_array_equal(result[:4], [0, 0, 0, 1])
    assert np.isnan(result[4])
    assert result[5] == result[6] > 1e38
    assert result[7] == 1


def test_powers_of_two_are_accurate_to_two_units_in_the_last_place() -> None:
    values = np.linspace(-126.0, 1.0, 1_600_000, dtype=np.float32)
    expected = np.exp2(values.astype(np.float64))
    error = np.abs(powers_of_two(values) - expected) / expected
    assert error.max() < 2 * np.finfo(np.float32).eps


def test_powers_of_two_know_their_limits() -> None:
    values = np.array([-np.inf, -200, -126.6, 0, np.nan, 1, -0.0, -1] * 2, np.float32)
    result = powers_of_two(values)
    np.testing.assert_array_equal(result[[0, 1, 2, 3, 5, 6, 7]], [0, 0, 0, 1, 2, 1, 0.5])
    assert np.isnan(result[4])


@each_arithmetic
@pytest.mark.parametrize("size", [64, 70, 192])
def test_norm_matches_the_reference_for_any_size(arithmetic: Arithmetic, size: int) -> None:
    random = np.random.default_rng(size)
    padded = -(-size // 64) * 64
    hidden_TG = aligned_zeros((5, padded), np.float32)
    hidden_TG[:, :size] = random.standard_normal((5, size)) * 3
    weight_G = aligned_zeros((padded,), np.float32)
    weight_G[:size] = random.standard_normal(size)
    out = np.full(5 * padded * arithmetic.input_bytes // 4, 0xFFFFFFFF, np.uint32)
    expected = rms_norm(hidden_TG[:, :size], weight_G[:size], eps=1e-5)

    norm_rows(arithmetic, hidden_TG, 5, size, weight_G, 1e-5, False, out.ctypes.data)

    normed = inputs_to_floats(arithmetic, out).reshape(5, padded)
    tolerance = 2**-8 if arithmetic.dots_pairs else 1e-6
    np.testing.assert_allclose(normed[:, :size], expected, rtol=tolerance, atol=1e-6)
    assert not normed[:, size:].any()


@each_arithmetic
def test_norm_rounds_the_residual_stream_to_what_the_wire_carries(arithmetic: Arithmetic) -> None:
    hidden_TG = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    before = hidden_TG.copy()
    out = np.zeros(2 * 64, np.uint32)
    weight_G = np.ones(64, np.float32)
    norm_rows(arithmetic, hidden_TG, 2, 64, weight_G, 1e-5, True, out.ctypes.data)
    if arithmetic.number_format == "fp32":
        np.testing.assert_array_equal(hidden_TG, before)
    else:
        assert not (hidden_TG.view(np.uint32) & 0xFFFF).any()
        np.testing.assert_allclose(hidden_TG, before, rtol=2**-8)
        assert (hidden_TG != before).any()


@each_arithmetic
def test_gated_silu_matches_the_reference(arithmetic: Arithmetic) -> None:
    random = np.random.default_rng(1)
    gate_up = (random.standard_normal((7, 2, 64)) * 20).astype(np.float32)
    gate_up[0, 0, :3] = [-300, 300, 0]
    out = np.full((7, 64 * arithmetic.input_bytes // 4), 0xFFFFFFFF, np.uint32)

    silu_multiply_panel(arithmetic, gate_up.ctypes.data, 7, out.ctypes.data, out.strides[0])

    expected = silu_multiply(gate_up[:, 0], gate_up[:, 1])
    tolerance = 2**-8 if arithmetic.dots_pairs else 1e-6
    actual = inputs_to_floats(arithmetic, out).reshape(7, 64)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-30)


@each_arithmetic
def test_rounding_to_the_wire_is_to_nearest_even_and_keeps_nans(arithmetic: Arithmetic) -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7FFFFFFF, 0xFF800000], np.uint32)
    source_TG = np.zeros((1, 64), np.float32)
    source_TG.view(np.uint32)[0, :5] = bits
    target_TG = np.full((1, 64), 0xFFFF).astype(element_type(arithmetic))

    narrow_rows(arithmetic, source_TG, 1, target_TG)

    if arithmetic.number_format == "fp32":
        np.testing.assert_array_equal(target_TG.view(np.uint32), source_TG.view(np.uint32))
    else:
        assert target_TG[0, :5].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7FFF, 0xFF80]
        assert not target_TG[0, 5:].any()


@each_arithmetic
def test_rows_survive_the_wire(arithmetic: Arithmetic) -> None:
    rows_TG = np.random.default_rng(2).integers(-200, 200, (3, 128)).astype(np.float32)
    wire_TG = np.zeros((3, 128), element_type(arithmetic))
    result_TG = np.full_like(rows_TG, np.nan)
    narrow_rows(arithmetic, rows_TG, 3, wire_TG)
    widen_rows(arithmetic, wire_TG, 3, result_TG)
    np.testing.assert_array_equal(result_TG, rows_TG)


@each_arithmetic
def test_rows_are_gathered_in_the_order_of_their_indices(arithmetic: Arithmetic) -> None:
    table_SG = np.arange(6, dtype=np.float32)[:, None] * np.ones((1, 64), np.float32)
    elements_SG = np.zeros((6, 64), element_type(arithmetic))
    narrow_rows(arithmetic, table_SG, 6, elements_SG)
    indices = np.array([5, 0, 5, 3], np.int32)
    widened_TG, gathered_TG = (np.full((4, 64), np.nan, np.float32) for _ in range(2))
    gather_widened_rows(arithmetic, elements_SG, indices, 4, widened_TG)
    gather_rows(table_SG, indices, 4, gathered_TG)
    np.testing.assert_array_equal(widened_TG, table_SG[indices])
    np.testing.assert_array_equal(gathered_TG, table_SG[indices])
