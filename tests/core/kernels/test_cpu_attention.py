"""Rotary embedding, cache writes and paged attention on the CPU against the references."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.arithmetic import LANES, Arithmetic
from core.kernels.attention.cpu import (
    TILE_QUERIES,
    AttentionWorkspace,
    HeadSizes,
    RowTable,
    attend,
)
from core.kernels.attention.reference import paged_attention
from core.kernels.memory import aligned_zeros
from core.kernels.norm.reference import rms_norm
from core.kernels.rotary.cpu import rotate_and_write
from core.kernels.rotary.reference import RotaryTables, rotary_tables, rotate
from core.kernels.team import Share
from tests.support.arithmetics import host_arithmetics, inputs_to_floats, rounded

each_arithmetic = pytest.mark.parametrize("arithmetic", host_arithmetics(), ids=lambda a: a.name)
FloatArray = npt.NDArray[np.float32]
EVERYTHING = 1 << 40
MAX_POSITIONS = 200
NAN_WORD = 0xFFFFFFFF  # a NaN in fp32, two in bf16


@dataclass
class Run:
    """Rows of one sequence from position `first` on."""

    slot: int
    first: int
    num_rows: int


class Layer:
    """The cache of one layer whose blocks are in random order and begin as NaN."""

    def __init__(
        self, arithmetic: Arithmetic, *, heads: int, kv_heads: int, head_dim: int,
        norms: bool = False, num_slots: int = 3, seed: int = 0,
    ) -> None:  # fmt: skip
        self.arithmetic = arithmetic
        self.random = np.random.default_rng(seed)
        self.width = -(-head_dim // LANES) * LANES
        self.heads = HeadSizes(
            heads, kv_heads, head_dim, self.width, norms, 1e-6, np.float32(head_dim**-0.5)
        )
        self.all_heads = Share(0, kv_heads)
        blocks = -(-MAX_POSITIONS // LANES)
        order = np.random.default_rng(seed + 100).permutation(num_slots * blocks)
        self.tables = order.astype(np.int32).reshape(num_slots, blocks)
        words = LANES * self.width // arithmetic.elements_per_word
        self.cache = aligned_zeros((num_slots * blocks, kv_heads, 2, words), np.uint32)
        self.cache[:] = NAN_WORD
        self.norms = aligned_zeros((2, self.width), np.float32)
        self.norms[:, :head_dim] = self.random.standard_normal((2, head_dim))
        self.rotary = rotary_tables(
            head_dim=head_dim, theta=1e4, scaling=None, num_positions=MAX_POSITIONS
        )
        queries = max(TILE_QUERIES, heads // kv_heads)
        positions = -(-MAX_POSITIONS // LANES) * LANES + 2 * LANES
        nan = np.float32(np.nan)
        self.work = AttentionWorkspace(
            np.full((queries, self.width * arithmetic.input_bytes // 4), NAN_WORD, np.uint32),
            np.full((queries, positions), nan, np.float32),
            np.full((queries, positions * arithmetic.input_bytes // 4), NAN_WORD, np.uint32),
            np.full((queries, self.width), nan, np.float32),
            np.full((queries,), nan, np.float32),
        )

    def rows(self, runs: list[Run]) -> RowTable:
        slots = np.concatenate([np.full(run.num_rows, run.slot, np.int32) for run in runs])
        positions = np.concatenate([run.first + np.arange(run.num_rows) for run in runs])
        return RowTable(
            len(slots), slots, positions.astype(np.int32), self.tables.ctypes.data,
            self.tables.strides[0],
        )  # fmt: skip

    def write(self, rows: RowTable, qkv_TNW: FloatArray) -> FloatArray:
        """Rotates and writes; returns the columns as the kernel left them."""
        columns = qkv_TNW.reshape(rows.num_rows, -1).copy()
        scratch = np.full(self.width, NAN_WORD, np.uint32)
        rotate_and_write(
            self.arithmetic, self.heads, self.all_heads, rows, columns, self.rotary.cos_LF,
            self.rotary.sin_LF, self.norms.ctypes.data, self.cache.ctypes.data, scratch.ctypes.data,
        )  # fmt: skip
        return columns

    def attend(self, rows: RowTable, columns: FloatArray, window: int = EVERYTHING) -> FloatArray:
        size = self.heads.num_heads * self.width * self.arithmetic.input_bytes // 4
        out = np.full((rows.num_rows, size), NAN_WORD, np.uint32)
        attend(
            self.arithmetic, self.heads, self.all_heads, rows, columns, self.cache.ctypes.data,
            window, self.work, out.ctypes.data, out.strides[0],
        )  # fmt: skip
        floats = inputs_to_floats(self.arithmetic, out)
        return floats.reshape(rows.num_rows, self.heads.num_heads, self.width)

    def random_columns(self, num_rows: int) -> FloatArray:
        heads = self.heads.num_heads + 2 * self.heads.num_kv_heads
        qkv_TNW = np.zeros((num_rows, heads, self.width), np.float32)
        shape = (num_rows, heads, self.heads.head_dim)
        qkv_TNW[:, :, : self.heads.head_dim] = self.random.standard_normal(shape)
        return qkv_TNW

    def cached(self) -> tuple[FloatArray, FloatArray]:
        """Keys and values [blocks, positions, KV heads, head_dim], unpacked."""
        per_word = self.arithmetic.elements_per_word
        kind = np.float32 if per_word == 1 else np.uint16
        num_blocks, kv_heads = self.cache.shape[:2]
        parts = self.cache.view(kind).reshape(num_blocks, kv_heads, 2, -1)
        if per_word == 2:
            parts = (parts.astype(np.uint32) << 16).view(np.float32)
        keys = parts[:, :, 0].reshape(num_blocks, kv_heads, -1, LANES, per_word)
        keys = keys.transpose(0, 3, 1, 2, 4).reshape(num_blocks, LANES, kv_heads, self.width)
        values = parts[:, :, 1].reshape(num_blocks, kv_heads, -1, self.width, per_word)
        values = values.transpose(0, 2, 4, 1, 3).reshape(num_blocks, LANES, kv_heads, self.width)
        return keys[..., : self.heads.head_dim], values[..., : self.heads.head_dim]


SHAPES = [(4, 2, 16), (9, 3, 64), (7, 1, 48), (14, 1, 8), (2, 2, 128), (1, 1, 20)]


@each_arithmetic
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("norms", [False, True])
def test_keys_are_normed_and_rotated_and_land_in_their_blocks(
    arithmetic: Arithmetic, heads: int, kv_heads: int, head_dim: int, norms: bool
) -> None:
    layer = Layer(arithmetic, heads=heads, kv_heads=kv_heads, head_dim=head_dim, norms=norms)
    rows = layer.rows([Run(0, 0, 21), Run(2, 0, 3)])
    qkv_TNW = layer.random_columns(rows.num_rows)
    columns_TNW = layer.write(rows, qkv_TNW).reshape(qkv_TNW.shape)

    q, k, v = np.split(qkv_TNW[..., :head_dim], [heads, heads + kv_heads], axis=1)
    if norms:
        q = rms_norm(q, layer.norms[0, :head_dim], eps=1e-6)
        k = rms_norm(k, layer.norms[1, :head_dim], eps=1e-6)
    tables = RotaryTables(layer.rotary.cos_LF, layer.rotary.sin_LF)
    keys_BPKD, values_BPKD = layer.cached()
    blocks = layer.tables[rows.slots_T, rows.positions_T // LANES]
    offsets = rows.positions_T % LANES
    tolerance = 2**-8 if arithmetic.number_format == "bf16" else 1e-5
    rotated_k = rotate(k, rows.positions_T, tables)
    np.testing.assert_allclose(keys_BPKD[blocks, offsets], rotated_k, rtol=tolerance, atol=2e-6)
    np.testing.assert_array_equal(
        values_BPKD[blocks, offsets], rounded(v, arithmetic.number_format)
    )
    expected_q = rotate(q, rows.positions_T, tables) * head_dim**-0.5
    np.testing.assert_allclose(columns_TNW[:, :heads, :head_dim], expected_q, rtol=1e-5, atol=1e-6)


@each_arithmetic
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("window", [EVERYTHING, 1, 19, 40])
def test_attention_matches_the_reference(
    arithmetic: Arithmetic, heads: int, kv_heads: int, head_dim: int, window: int
) -> None:
    layer = Layer(arithmetic, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    before = layer.rows([Run(0, 0, 70), Run(1, 0, 16), Run(2, 0, 5)])
    layer.write(before, layer.random_columns(before.num_rows))
    runs = [Run(0, 70, 1), Run(2, 5, 30), Run(1, 16, 1)]
    rows = layer.rows(runs)
    columns = layer.write(rows, layer.random_columns(rows.num_rows))

    actual = layer.attend(rows, columns, window)[..., :head_dim]

    keys_BPKD, values_BPKD = layer.cached()
    q = columns.reshape(rows.num_rows, -1, layer.width)[:, :heads, :head_dim]
    expected = paged_attention(
        q * np.float32(head_dim**0.5),
        keys_BPKD,
        values_BPKD,
        block_tables_RC=layer.tables[[run.slot for run in runs]],
        first_positions_R=np.array([run.first for run in runs], np.int32),
        num_rows_R=np.array([run.num_rows for run in runs], np.int32),
        window=None if window == EVERYTHING else window,
    )
    tolerance = 2e-2 if arithmetic.dots_pairs else 2e-6
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@each_arithmetic
@pytest.mark.parametrize("window", [EVERYTHING, 17])
def test_attention_of_a_row_depends_on_its_own_sequence_alone(
    arithmetic: Arithmetic, window: int
) -> None:
    def outputs(sizes: list[int], *, seed: int, companion: bool) -> FloatArray:
        """Attention of 60 positions of slot 0, computed in chunks of the given sizes."""
        layer = Layer(arithmetic, heads=6, kv_heads=2, head_dim=32, seed=seed)
        parts, first = [], 0
        for size in sizes:
            runs = [Run(0, first, size)]
            if companion:
                runs = [Run(1, 0, 3), *runs, Run(2, 0, 20)]
            rows = layer.rows(runs)
            mine = np.flatnonzero(rows.slots_T == 0)
            qkv_TNW = layer.random_columns(rows.num_rows)
            qkv_TNW[mine] = sequence[first : first + size]
            parts.append(layer.attend(rows, layer.write(rows, qkv_TNW), window)[mine])
            first += size
        return np.concatenate(parts)

    sequence = np.random.default_rng(5).standard_normal((60, 10, 32)).astype(np.float32)
    whole = outputs([60], seed=1, companion=False)
    assert np.isfinite(whole).all()
    for sizes in ([1] * 60, [7] * 8 + [4], [33, 27], [16, 16, 28]):
        np.testing.assert_array_equal(outputs(sizes, seed=2, companion=True), whole)
