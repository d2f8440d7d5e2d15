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
from tests.support.arithmetics import cache_arithmetics, inputs_to_floats, rounded

KINDS = cache_arithmetics()
each_arithmetic = pytest.mark.parametrize("arithmetic", KINDS, ids=lambda a: a.name)
each_of_integers = pytest.mark.parametrize(
    "arithmetic", [kind for kind in KINDS if kind.is_integer], ids=lambda a: a.name
)
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
        words = arithmetic.cache_bytes(self.width) // 4
        self.cache = aligned_zeros((num_slots * blocks, kv_heads, 2, words), np.uint32)
        self.cache[:] = NAN_WORD
        self.norms = aligned_zeros((2, self.width), np.float32)
        self.norms[:, :head_dim] = self.random.standard_normal((2, head_dim))
        self.rotary = rotary_tables(
            head_dim=head_dim, theta=1e4, scaling=None, num_positions=MAX_POSITIONS
        )
        queries = max(TILE_QUERIES, heads // kv_heads)
        seen = blocks + 2
        nan = np.float32(np.nan)
        self.work = AttentionWorkspace(
            np.full((queries, arithmetic.query_bytes(self.width) // 4), NAN_WORD, np.uint32),
            np.full((queries, seen * LANES), nan, np.float32),
            np.full((queries, seen * arithmetic.weight_block_bytes // 4), NAN_WORD, np.uint32),
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
        beside = self.arithmetic.unquantised
        size = self.heads.num_heads * self.width * beside.input_bytes // 4
        out = np.full((rows.num_rows, size), NAN_WORD, np.uint32)
        attend(
            self.arithmetic, self.heads, self.all_heads, rows, columns, self.cache.ctypes.data,
            window, self.work, out.ctypes.data, out.strides[0],
        )  # fmt: skip
        floats = inputs_to_floats(beside, out)
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
        num_blocks, kv_heads = self.cache.shape[:2]
        words = self.cache[..., : LANES * self.width // per_word]
        kind = {1: np.float32, 2: np.uint16, 4: np.int8}[per_word]
        parts = np.ascontiguousarray(words).view(kind)
        if per_word == 2:
            parts = (parts.astype(np.uint32) << 16).view(np.float32)
        if per_word == 4:
            parts = parts.astype(np.float32)
            parts[:, :, 0] = np.where(parts[:, :, 0] < 0, 128, -128) + parts[:, :, 0]
        keys = parts[:, :, 0].reshape(num_blocks, kv_heads, -1, LANES, per_word)
        keys = keys.transpose(0, 3, 1, 2, 4).reshape(num_blocks, LANES, kv_heads, self.width)
        values = parts[:, :, 1].reshape(num_blocks, kv_heads, -1, self.width, per_word)
        values = values.transpose(0, 2, 4, 1, 3).reshape(num_blocks, LANES, kv_heads, self.width)
        if self.arithmetic.is_integer:
            scales = self.cache[..., -LANES:].view(np.float32).transpose(0, 3, 1, 2)
            keys, values = keys * scales[..., :1], values * scales[..., 1:]
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
    keys, values = keys_BPKD[blocks, offsets], values_BPKD[blocks, offsets]
    if arithmetic.is_integer:
        for stored, exact in ((keys, rotated_k), (values, v)):
            half_a_step = np.abs(exact).max(axis=2, keepdims=True) / 254
            assert (np.abs(stored - exact) <= half_a_step * 1.001 + 2e-6).all()
    else:
        np.testing.assert_allclose(keys, rotated_k, rtol=tolerance, atol=2e-6)
        np.testing.assert_array_equal(values, rounded(v, arithmetic.number_format))
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
    is_coarse = arithmetic.dots_pairs or arithmetic.is_integer
    tolerance = 2e-2 if is_coarse else 2e-6
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


def attended(arithmetic: Arithmetic, qkv_TNW: FloatArray) -> FloatArray:
    """Attention of all rows of one sequence with one head, from position 0 on, without rotation."""
    layer = Layer(arithmetic, heads=1, kv_heads=1, head_dim=qkv_TNW.shape[2])
    rows = layer.rows([Run(0, 0, len(qkv_TNW))])
    layer.rotary.sin_LF[:], layer.rotary.cos_LF[:] = 0.0, 1.0
    return layer.attend(rows, layer.write(rows, qkv_TNW))


@each_of_integers
def test_many_small_weights_count_beside_a_great_one_far_away(arithmetic: Arithmetic) -> None:
    random = np.random.default_rng(3)
    qkv_TNW = np.zeros((180, 3, 32), np.float32)
    qkv_TNW[:, 0, 0] = np.float32(32**0.5)
    qkv_TNW[0, 1, 0] = 8.0  # e ** 8 times the weight of each other position
    qkv_TNW[0, 2] = random.standard_normal(32)
    qkv_TNW[1:, 2] = 5.0 + random.standard_normal((179, 32))
    q, k, v = (qkv_TNW[:, head : head + 1] for head in range(3))
    exact = paged_attention(
        q[-1:], k[:, None], v[:, None],
        block_tables_RC=np.arange(180, dtype=np.int32)[None],
        first_positions_R=np.array([179], np.int32), num_rows_R=np.ones(1, np.int32),
    )  # fmt: skip
    # The small weights of 179 positions are 0.28 of this, those of the great one's block 0.02.
    np.testing.assert_allclose(attended(arithmetic, qkv_TNW)[-1], exact[0], rtol=0, atol=0.04)


@each_of_integers
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_makes_the_rows_that_see_it_not_finite(
    arithmetic: Arithmetic, part: int, value: float
) -> None:
    qkv_TNW = np.random.default_rng(4).standard_normal((40, 3, 16)).astype(np.float32)
    qkv_TNW[20, part, 3] = value
    actual = attended(arithmetic, qkv_TNW)
    is_finite_T = np.isfinite(actual).all(axis=(1, 2))
    sees = np.arange(40) == 20 if part == 0 else np.arange(40) >= 20
    np.testing.assert_array_equal(is_finite_T, ~sees)


def test_integers_have_the_same_bits_whatever_multiplies_them() -> None:
    qkv_TNW = np.random.default_rng(6).standard_normal((100, 3, 64)).astype(np.float32)
    kinds = {kind.instructions for kind in KINDS if kind.is_integer}
    results = [
        attended(Arithmetic("int8", instructions, "portable"), qkv_TNW) for instructions in kinds
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
