"""CUDA rotary embedding with norms of heads and KV write against the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.norm.reference import rms_norm
from core.kernels.rotary import cuda as kernels
from core.kernels.rotary import reference
from tests.support.cuda import (
    LAUNCH,
    TOLERANCES,
    nans_on_device,
    needs_cuda,
    on_device,
    to_floats,
)

pytestmark = [pytest.mark.cuda, needs_cuda]

EPS = 1e-5
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 6
NUM_QK = (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
NUM_COLUMNS = NUM_QK + NUM_KV_HEADS * HEAD_DIM
CACHE_SHAPE = (3, 4, NUM_KV_HEADS, HEAD_DIM)
POSITIONS = np.array([5, 6, 9], np.int32)
SLOTS = np.array([1, 1, 0], np.int32)
BLOCK_TABLES = np.array([[1, 2, 0], [1, 2, 1]], np.int32)
TABLES = reference.rotary_tables(head_dim=HEAD_DIM, theta=10000.0, scaling=None, num_positions=32)


@dataclass
class Case:
    """Three rows of two sequences."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(4))

    def __post_init__(self) -> None:
        self.qkv_TC, self.bias_C, self.q_norm_D, self.k_norm_D = (
            self.random.standard_normal(shape).astype(np.float32)
            for shape in [(3, NUM_COLUMNS), NUM_COLUMNS, HEAD_DIM, HEAD_DIM]
        )

    def on_cuda(
        self, number_format: str, *, norms: bool, positions_T: npt.NDArray[np.int32] = POSITIONS
    ) -> list[npt.NDArray[np.float32]]:
        """Rotated q, keys and values."""
        keys_BPKD, values_BPKD = (nans_on_device(CACHE_SHAPE, number_format) for _ in range(2))
        out_TND = nans_on_device((3, NUM_HEADS, HEAD_DIM))
        kernels.rotate_and_write(
            on_device(self.qkv_TC),
            on_device(self.bias_C),
            q_norm_D=on_device(self.q_norm_D),
            k_norm_D=on_device(self.k_norm_D),
            norm_eps=EPS if norms else None,
            slots_T=on_device(SLOTS),
            positions_T=on_device(positions_T),
            block_tables_SM=on_device(BLOCK_TABLES),
            cos_LF=on_device(TABLES.cos_LF),
            sin_LF=on_device(TABLES.sin_LF),
            keys_BPKD=keys_BPKD,
            values_BPKD=values_BPKD,
            out_TND=out_TND,
            number_format=number_format,
            launch=LAUNCH,
        )
        return [to_floats(array.copy_to_host()) for array in (out_TND, keys_BPKD, values_BPKD)]

    def on_reference(self, *, norms: bool) -> list[npt.NDArray[np.float32]]:
        heads_TND = (self.qkv_TC + self.bias_C).reshape(3, -1, HEAD_DIM)
        q_TND, k_TKD, v_TKD = np.split(heads_TND, [NUM_HEADS, NUM_HEADS + NUM_KV_HEADS], axis=1)
        if norms:
            q_TND = normed_heads(q_TND, self.q_norm_D)
            k_TKD = normed_heads(k_TKD, self.k_norm_D)
        keys_BPKD, values_BPKD = (np.full(CACHE_SHAPE, np.nan, np.float32) for _ in range(2))
        out_TND = reference.rotate_and_write(
            q_TND,
            k_TKD,
            v_TKD,
            positions_T=POSITIONS,
            block_ids_T=BLOCK_TABLES[SLOTS, POSITIONS // CACHE_SHAPE[1]],
            tables=TABLES,
            keys_BPKD=keys_BPKD,
            values_BPKD=values_BPKD,
        )
        return [out_TND, keys_BPKD, values_BPKD]


def normed_heads(heads: npt.NDArray[np.float32], weight_D: Any) -> npt.NDArray[np.float32]:
    rows = np.ascontiguousarray(heads).reshape(-1, HEAD_DIM)
    return rms_norm(rows, weight_D, eps=EPS).reshape(heads.shape)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_rotated_heads_and_written_cache_equal_the_reference(
    number_format: str, norms: bool
) -> None:
    case = Case()
    tolerance = TOLERANCES[number_format]
    for actual, expected in zip(
        case.on_cuda(number_format, norms=norms), case.on_reference(norms=norms), strict=True
    ):
        # NaN equals NaN here: what was not written must still be NaN.
        np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=1e-2)


def test_rows_that_are_padding_write_nothing() -> None:
    padding = np.full(3, -1, np.int32)
    for array in Case().on_cuda("fp32", norms=False, positions_T=padding):
        assert np.isnan(array).all()
