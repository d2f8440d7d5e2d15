"""Decodes with our engines, one after the other in one process, as stages on one card are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.engine.backend import MakeBackend
from core.models.llama.config import LlamaConfig
from core.pipeline.batch import MicroBatch
from core.sampling.parameters import SamplingParameters
from core.weights.checkpoint import Checkpoint
from tests.support.chain import BLOCK_SIZE, Chain, Run

GREEDY = SamplingParameters(max_tokens=1, temperature=0.0)
WARM_UP_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """So many sequences, decoded for so many steps behind prompts of so many tokens."""

    num_sequences: int
    prompt_tokens: int
    num_steps: int

    @property
    def num_positions(self) -> int:
        return self.prompt_tokens + WARM_UP_STEPS + self.num_steps

    @property
    def mean_context(self) -> float:
        """Positions that a row sees, on average over the measured steps."""
        return self.prompt_tokens + WARM_UP_STEPS + (self.num_steps + 1) / 2


def make_chain(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    *,
    num_stages: int,
    loads: Sequence[Load],
    make_backend: MakeBackend,
) -> Chain:
    """Engines in bf16 with room for the greatest of the loads."""
    blocks = max(load.num_sequences * (-(-load.num_positions // BLOCK_SIZE)) for load in loads)
    return Chain(
        checkpoint,
        config,
        num_stages=num_stages,
        number_format="bf16",
        num_slots=max(load.num_sequences for load in loads),
        num_kv_blocks=blocks,
        max_rows=max(max(load.num_sequences, load.prompt_tokens) for load in loads),
        make_backend=make_backend,
    )


def decode_step_s(chain: Chain, load: Load, *, vocab_size: int) -> float:
    """Median seconds of a decode step of all sequences through all stages."""
    random = np.random.default_rng(1)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in random.integers(0, vocab_size, count)]

    slots = range(load.num_sequences)
    for slot in slots:
        chain.start(slot, GREEDY)
        chain.step([Run(slot, tokens(load.prompt_tokens))])
    # Batches are made beforehand: a coordinator makes them elsewhere.
    batches = [
        chain._micro_batch([Run(slot, tokens(1)) for slot in slots])
        for _ in range(WARM_UP_STEPS + load.num_steps)
    ]
    times_s = [_step_s(chain, batch) for batch in batches][WARM_UP_STEPS:]
    for slot in slots:
        chain.end(slot)
    return float(np.median(times_s))


def _step_s(chain: Chain, batch: MicroBatch) -> float:
    started_s = time.perf_counter()
    hidden = None
    for engine in chain.engines:
        hidden = engine.step(batch, hidden).hidden_TH
    return time.perf_counter() - started_s
