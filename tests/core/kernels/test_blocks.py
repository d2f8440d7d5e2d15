"""Rows in blocks of int8: the bound of their error, what is no number, and equal bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from core.kernels.blocks import cpu, reference
from core.kernels.blocks.layout import BLOCK, num_elements, row_bytes, scale_bits

FloatArray = npt.NDArray[np.float32]
SIZES = [1, 6, BLOCK, BLOCK + 1, 576, 896]
# Half of a scale; what a quotient of float32 is off by may move an element over the middle.
HALF = np.float64(0.5 * (1 + 2**-16))


def encoded(rows_TH: FloatArray) -> npt.NDArray[np.uint8]:
    num_rows, size = rows_TH.shape
    out_TW = np.full((num_rows, row_bytes(size)), 0x55, np.uint8)
    cpu.encode_rows(rows_TH, num_rows, size, out_TW)
    return out_TW


def decoded(rows_TW: npt.NDArray[np.uint8], *, size: int) -> FloatArray:
    out_TH = np.full((len(rows_TW), size), np.nan, np.float32)
    cpu.decode_rows(rows_TW, len(rows_TW), size, out_TH)
    return out_TH


def scales(rows_TW: npt.NDArray[np.uint8], *, size: int) -> npt.NDArray[np.float64]:
    """Of each element."""
    wide_TB = (scale_bits(rows_TW, size=size).astype(np.uint32) << 16).view(np.float32)
    return wide_TB.astype(np.float64).repeat(BLOCK, axis=1)[:, :size]


def some_rows(size: int) -> FloatArray:
    """Rows of magnitudes from the smallest to the largest, some of them with what is no number."""
    random = np.random.default_rng(size)
    powers_T1 = np.linspace(-44, 38, 40)[:, None]
    rows_TH = random.uniform(-1, 1, (40, size)) * 10.0**powers_T1
    rows_TH[::5] *= random.exponential(size=size) ** 3
    rows_TH[3] = 0
    rows_TH[4, 0], rows_TH[5, -1], rows_TH[6, size // 2] = np.nan, np.inf, -np.inf
    return np.clip(rows_TH, -3e38, 3e38, where=np.isfinite(rows_TH), out=rows_TH).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_the_compiled_kernels_and_the_reference_agree_to_the_bit(size: int) -> None:
    rows_TH = some_rows(size)
    rows_TW = encoded(rows_TH)
    np.testing.assert_array_equal(rows_TW, reference.encode_rows(rows_TH))
    expected = reference.decode_rows(rows_TW, size=size)
    np.testing.assert_array_equal(decoded(rows_TW, size=size), expected)


@pytest.mark.parametrize("size", SIZES)
def test_rows_that_are_padded_leave_the_padding_as_it_is(size: int) -> None:
    rows_TG = np.full((2, size + 5), 7, np.float32)
    rows_TW = np.zeros((2, row_bytes(size)), np.uint8)
    cpu.encode_rows(rows_TG, 2, size, rows_TW)
    rows_TG[:] = 3
    cpu.decode_rows(rows_TW, 2, size, rows_TG)
    assert (rows_TG[:, size:] == 3).all()
    np.testing.assert_allclose(rows_TG[:, :size], 7, rtol=0.01)


@given(
    rows_TH=arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 2 * BLOCK + 3)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_no_element_is_off_by_more_than_half_of_its_scale(rows_TH: FloatArray) -> None:
    rows_TW, size = encoded(rows_TH), rows_TH.shape[1]
    scales_TH = scales(rows_TW, size=size)
    errors_TH = np.abs(rows_TH.astype(np.float64) - decoded(rows_TW, size=size))
    assert (errors_TH <= HALF * scales_TH).all()
    for first in range(0, size, BLOCK):
        largest_T = np.abs(rows_TH[:, first : first + BLOCK]).max(axis=1).astype(np.float64)
        # A 127th, rounded up to 8 significant bits, or to a multiple of the smallest bfloat16.
        assert (scales_TH[:, first] <= largest_T / 127 * (1 + 2**-7) + 2.0**-133).all()


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(what: float) -> None:
    rows_TH = np.ones((2, 3 * BLOCK), np.float32)
    rows_TH[1, BLOCK + 3] = what
    rows_TW = encoded(rows_TH)
    back_TH = decoded(rows_TW, size=3 * BLOCK)
    spoiled = np.zeros_like(rows_TH, dtype=np.bool_)
    spoiled[1, BLOCK : 2 * BLOCK] = True
    np.testing.assert_array_equal(np.isnan(back_TH), spoiled)
    assert np.isfinite(scales(rows_TW, size=3 * BLOCK)).all()


@given(size=st.integers(1, 10_000))
def test_the_size_of_a_row_tells_its_number_of_elements(size: int) -> None:
    assert num_elements(row_bytes(size)) == size
