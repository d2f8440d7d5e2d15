"""`python -m tests.benchmarks.kernels`: how long the parts of a stage's step take on one core.

Of a stage of 15 layers of SmolLM2-135M's sizes, in bf16: rotation with the write of keys and
values, attention, and sampling, for decode steps and for chunks of a prompt. Each layer has
its own cache and each sequence its own scattered blocks, as in a mesh. Beside each time: the
share of what the same core reaches at reading memory (blocks in random order) and at
products of pairs held in registers.
"""

# numba infers the types of kernels.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.table import Table

from core.engine.stage_memory import allocate_attention, allocate_cache
from core.kernels.arithmetic import LANES
from core.kernels.attention.cpu import RowTable, attend
from core.kernels.compile import kernel
from core.kernels.host_arithmetic import host_arithmetic
from core.kernels.memory import aligned_zeros
from core.kernels.rotary.cpu import rotate_and_write
from core.kernels.rotary.reference import rotary_tables
from core.kernels.team import Share
from core.kernels.vectors import address, load_floats, maximum, splat, sum_of_lanes
from core.models.llama.config import LlamaConfig
from core.models.llama.packing import StageLayout
from core.sampling.parameters import SamplingParameters
from core.sampling.sampler import Sampler
from services.cli.console import out as console

NUM_LAYERS = 15
CONFIG = LlamaConfig(
    family="llama", num_layers=30, hidden_size=576, intermediate_size=1536, num_heads=9,
    num_kv_heads=3, head_dim=64, vocab_size=49152, context_length=8192, norm_eps=1e-5,
    rope_theta=1e5,
)  # fmt: skip
DECODES = [(rows, context) for context in (100, 500, 2000) for rows in (1, 8, 32, 64)]
PREFILLS = [(256, first) for first in (0, 1000, 2000)]
SAMPLINGS = {
    "temperature 0.8": SamplingParameters(max_tokens=1, temperature=0.8),
    "top_p 0.95": SamplingParameters(max_tokens=1, temperature=0.8, top_p=0.95),
    "top_k 50, top_p 0.95": SamplingParameters(max_tokens=1, temperature=0.8, top_k=50, top_p=0.95),
    "penalties": SamplingParameters(
        max_tokens=1, temperature=0.8, top_p=0.95, repetition_penalty=1.1
    ),
}
EVERYTHING = 1 << 40  # positions of a window
REPEATS = 7


@dataclass(frozen=True)
class Case:
    """`num_rows` sequences with a row each at position `first`, or a chunk of one sequence."""

    num_rows: int
    first: int
    is_chunk: bool

    @property
    def name(self) -> str:
        kind = "chunk" if self.is_chunk else "rows"
        return f"{self.num_rows} {kind} at {self.first}"

    @property
    def num_slots(self) -> int:
        return 1 if self.is_chunk else self.num_rows

    @property
    def end(self) -> int:
        return self.first + (self.num_rows if self.is_chunk else 1)

    @property
    def num_pairs(self) -> int:
        """Pairs of a row and a position that it sees."""
        if not self.is_chunk:
            return self.num_rows * self.end
        return sum(range(self.first + 1, self.end + 1))

    @property
    def operations(self) -> int:
        """Multiplications and additions of attention in a layer."""
        return 4 * self.num_pairs * CONFIG.num_heads * CONFIG.head_dim

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that a layer holds for the rows."""
        return self.num_slots * self.end * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 2


@kernel
def rotate_layers(arithmetic, heads, rows, qkv_TC, cos, sin, norms, cache_L, scratch):
    """Rotation and writes of every layer."""
    for layer in range(cache_L.shape[0]):
        rotate_and_write(
            arithmetic, heads, Share(0, heads.num_kv_heads), rows, qkv_TC, cos, sin, norms,
            address(cache_L[layer]), scratch,
        )  # fmt: skip


@kernel
def attend_layers(arithmetic, heads, rows, qkv_TC, cache_L, work, out, out_stride):
    """Attention of every layer."""
    for layer in range(cache_L.shape[0]):
        attend(
            arithmetic, heads, Share(0, heads.num_kv_heads), rows, qkv_TC,
            address(cache_L[layer]), EVERYTHING, work, out, out_stride,
        )  # fmt: skip


@kernel
def read_memory(start, order_B, block_bytes):
    """Reads blocks in an order."""
    a = b = splat(np.float32(0.0))
    for number in order_B:
        block = start + np.int64(number) * block_bytes
        for line in range(block, block + block_bytes, 128):
            a, b = maximum(a, load_floats(line)), maximum(b, load_floats(line + 64))
    return sum_of_lanes(maximum(a, b))


def best_time(run: Callable[[], object], *, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    run()
    return min(_timed(run) for _ in range(repeats))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Layers:
    """The caches of all layers for one case, and what the kernels work in."""

    def __init__(self, case: Case) -> None:
        self.arithmetic = host_arithmetic("bf16")
        self.layout = StageLayout(CONFIG, self.arithmetic)
        self.heads = self.layout.head_sizes()
        random = np.random.default_rng(0)
        blocks = -(-case.end // LANES)
        order = random.permutation(case.num_slots * blocks).astype(np.int32)
        tables = order.reshape(case.num_slots, blocks)
        slots = np.zeros(case.num_rows, np.int32)
        positions = np.full(case.num_rows, case.first, np.int32)
        if case.is_chunk:
            positions += np.arange(case.num_rows, dtype=np.int32)
        else:
            slots += np.arange(case.num_rows, dtype=np.int32)
        self._tables = tables  # which the row table has by address
        self.rows = RowTable(case.num_rows, slots, positions, tables.ctypes.data, tables.strides[0])
        self.cache = allocate_cache(self.layout, NUM_LAYERS, case.num_slots * blocks)
        # Both halves of every word: between 0.5 and 1, or minus that.
        self.cache[:] = 0x3F003F00
        self.cache ^= random.integers(0, 1 << 32, self.cache.shape[1:], np.uint32) & 0x807F807F
        self.qkv = aligned_zeros((case.num_rows, self.layout.qkv), np.float32)
        self.qkv[:] = random.standard_normal(self.qkv.shape) / 8
        self.work = allocate_attention(self.layout, num_positions=case.end)
        words = self.layout.input_words(self.layout.attention)
        self.out = aligned_zeros((case.num_rows, words), np.uint32)
        self.angles = rotary_tables(
            head_dim=CONFIG.head_dim, theta=CONFIG.rope_theta, scaling=None, num_positions=case.end
        )
        self.scratch = aligned_zeros((2, self.layout.head_width), np.float32)

    def attend(self) -> None:
        attend_layers(
            self.arithmetic, self.heads, self.rows, self.qkv, self.cache, self.work,
            self.out.ctypes.data, self.out.strides[0],
        )  # fmt: skip

    def rotate(self) -> None:
        rotate_layers(
            self.arithmetic, self.heads, self.rows, self.qkv, self.angles.cos_LF,
            self.angles.sin_LF, 0, self.cache, self.scratch.ctypes.data,
        )  # fmt: skip


def memory_bandwidth() -> float:
    """Bytes/s at reading 12 KiB blocks in random order."""
    block_bytes, count = 12 * 1024, 20_000
    memory = aligned_zeros((count * block_bytes,), np.uint8)
    memory[:] = 0
    order = np.random.default_rng(0).permutation(count)
    seconds = best_time(lambda: read_memory(memory.ctypes.data, order, block_bytes), repeats=3)
    return memory.nbytes / seconds


def cases() -> Iterator[Case]:
    for num_rows, first in DECODES:
        yield Case(num_rows, first, is_chunk=False)
    for num_rows, first in PREFILLS:
        yield Case(num_rows, first, is_chunk=True)


def attention_table() -> Table:
    table = Table("part", "rotary ms", "attention ms", "GFLOP/s", "GB/s", title="15 layers")
    for case in cases():
        layers = Layers(case)
        rotary, attention = best_time(layers.rotate), best_time(layers.attend)
        table.add_row(
            case.name,
            f"{rotary * 1e3:.3f}",
            f"{attention * 1e3:.3f}",
            f"{case.operations * NUM_LAYERS / attention / 1e9:.0f}",
            f"{case.cache_bytes * NUM_LAYERS / attention / 1e9:.1f}",
        )
    return table


def sampling_table() -> Table:
    table = Table("sampling", "1 row us", "64 rows us", "us a row", title="last stage")
    logits_SV = np.random.default_rng(0).standard_normal((64, CONFIG.vocab_size)) * 3
    logits_SV = logits_SV.astype(np.float32)
    slots, positions = np.arange(64, dtype=np.int32), np.full(64, 100, np.int32)
    for name, parameters in SAMPLINGS.items():
        sampler = Sampler(CONFIG.vocab_size, 64)
        for slot in range(64):
            sampler.start(slot, parameters, tuple(range(100)), 50)
        one, many = (
            best_time(partial(sampler.sample, logits_SV[:n], slots[:n], positions[:n]))
            for n in (1, 64)
        )
        table.add_row(name, f"{one * 1e6:.0f}", f"{many * 1e6:.0f}", f"{many / 64 * 1e6:.1f}")
    return table


def main() -> None:
    """Measures and prints tables."""
    console.print(f"reading blocks of 12 KiB: {memory_bandwidth() / 1e9:.1f} GB/s")
    console.print(attention_table())
    console.print(sampling_table())


if __name__ == "__main__":
    main()
