"""CUDA paged attention against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.attention import cuda as kernels
from core.kernels.attention import reference
from tests.support.cuda import (
    LAUNCH,
    TOLERANCES,
    nans_on_device,
    needs_cuda,
    on_device,
    random_in_format,
    to_floats,
)

pytestmark = [pytest.mark.cuda, needs_cuda]

BLOCK_SIZE = 4
SPLIT = 32


def to_words(cache_BPKD: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Elements as the kernel reads them, heads padded to whole words with zeros."""
    padding = -cache_BPKD.shape[3] % (8 // cache_BPKD.itemsize)
    padded = np.pad(cache_BPKD, [(0, 0)] * 3 + [(0, padding)])
    return np.ascontiguousarray(padded).view(np.int64)


@dataclass
class Case:
    """Runs over a shuffled paged cache whose unused positions are NaN."""

    first_positions_R: npt.NDArray[np.int32]
    num_rows_R: npt.NDArray[np.int32]
    q_TND: npt.NDArray[Any]
    keys_BPKD: npt.NDArray[Any]
    values_BPKD: npt.NDArray[Any]
    block_tables_RC: npt.NDArray[np.int32]
    number_format: str

    def on_cuda(self, window: int | None) -> npt.NDArray[np.float32]:
        slots_T = np.repeat(np.arange(len(self.num_rows_R), dtype=np.int32), self.num_rows_R)
        positions = [
            np.arange(first, first + count, dtype=np.int32)
            for first, count in zip(self.first_positions_R, self.num_rows_R, strict=True)
        ]
        longest = int((self.first_positions_R + self.num_rows_R).max())
        num_rows, num_heads, head_dim = self.q_TND.shape
        splits = kernels.num_splits(longest, split=SPLIT)
        partial_shape = (num_rows, splits, num_heads)
        partials = kernels.Partials(
            nans_on_device((*partial_shape, head_dim)),
            nans_on_device(partial_shape),
            nans_on_device(partial_shape),
        )
        out_TND = nans_on_device(self.q_TND.shape, self.number_format)
        kernels.paged_attention(
            on_device(self.q_TND),
            on_device(to_words(self.keys_BPKD)),
            on_device(to_words(self.values_BPKD)),
            block_tables_SM=on_device(self.block_tables_RC),
            slots_T=on_device(slots_T),
            positions_T=on_device(np.concatenate(positions)),
            window=window,
            partials=partials,
            out_TND=out_TND,
            number_format=self.number_format,
            launch=LAUNCH,
            split=SPLIT,
        )
        return to_floats(out_TND.copy_to_host())

    def on_reference(self, window: int | None) -> npt.NDArray[np.float32]:
        return reference.paged_attention(
            self.q_TND,
            to_floats(self.keys_BPKD),
            to_floats(self.values_BPKD),
            block_tables_RC=self.block_tables_RC,
            first_positions_R=self.first_positions_R,
            num_rows_R=self.num_rows_R,
            window=window,
        )


def make_case(
    runs: list[tuple[int, int]],
    number_format: str,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 6,
) -> Case:
    """`runs` are pairs of first position and number of rows."""
    random = np.random.default_rng(5)
    lengths = [first + count for first, count in runs]
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    shape = (sum(num_blocks), BLOCK_SIZE, num_kv_heads, head_dim)
    keys_BPKD, values_BPKD = (random_in_format(random, shape, number_format) for _ in range(2))
    blocks = random.permutation(sum(num_blocks)).astype(np.int32)
    block_tables_RC = np.full((len(runs), max(num_blocks)), -1, np.int32)
    nan = np.float32(np.nan) if number_format == "fp32" else np.uint16(0x7FC0)
    for r, count in enumerate(num_blocks):
        block_tables_RC[r, :count], blocks = blocks[:count], blocks[count:]
        last = block_tables_RC[r, count - 1]
        keys_BPKD[last, lengths[r] - (count - 1) * BLOCK_SIZE :] = nan
        values_BPKD[last, lengths[r] - (count - 1) * BLOCK_SIZE :] = nan
    num_rows = sum(count for _, count in runs)
    return Case(
        np.array([first for first, _ in runs], np.int32),
        np.array([count for _, count in runs], np.int32),
        random.standard_normal((num_rows, num_heads, head_dim)).astype(np.float32),
        keys_BPKD,
        values_BPKD,
        block_tables_RC,
        number_format,
    )


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_prefill_chunk_and_decodes_equal_the_reference(number_format: str) -> None:
    case = make_case([(3, 3), (0, 1), (37, 1)], number_format)
    np.testing.assert_allclose(
        case.on_cuda(None), case.on_reference(None), atol=TOLERANCES[number_format]
    )


@pytest.mark.parametrize("window", [1, 5, 20, 100])
def test_a_sliding_window_hides_older_positions(window: int) -> None:
    case = make_case([(39, 1)], "fp32")
    np.testing.assert_allclose(case.on_cuda(window), case.on_reference(window), atol=2e-6)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    # The last takes several blocks a group, and the last of them has fewer heads.
    [(3, 1, 6), (2, 2, 6), (7, 1, 36), (10, 1, 64)],
)
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_any_number_of_heads_a_group(
    num_heads: int, num_kv_heads: int, head_dim: int, number_format: str
) -> None:
    case = make_case(
        [(16, 1)],
        number_format,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    np.testing.assert_allclose(
        case.on_cuda(None), case.on_reference(None), atol=TOLERANCES[number_format]
    )


def test_a_row_is_the_same_to_the_bit_alone_and_among_others() -> None:
    together = make_case([(34, 1), (10, 2)], "fp32")
    alone = Case(
        together.first_positions_R[:1],
        together.num_rows_R[:1],
        together.q_TND[:1],
        together.keys_BPKD,
        together.values_BPKD,
        together.block_tables_RC[:1],
        "fp32",
    )
    np.testing.assert_array_equal(alone.on_cuda(None)[0], together.on_cuda(None)[0])


def test_rows_that_are_padding_become_zero() -> None:
    case = make_case([(0, 1), (2, 1)], "fp32")
    alone = make_case([(0, 1), (2, 1)], "fp32").on_cuda(None)
    case.first_positions_R = np.array([0, -1], np.int32)
    np.testing.assert_array_equal(case.on_cuda(None), alone * [[[1]], [[0]]])
