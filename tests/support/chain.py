"""Engines chained in one process: a pipeline without its network, for tests of numerics.

It is deliberately naive (one micro-batch at a time, blocks handed out in order), so
that what it computes depends on the engines alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from core.engine.backend import MakeBackend
from core.engine.cpu_backend import CpuBackend
from core.engine.engine import Engine, EngineSettings
from core.kernels.arithmetic import Arithmetic
from core.models.llama.config import LlamaConfig
from core.pipeline.batch import MicroBatch, SequenceStart, SequenceUpdates
from core.pipeline.plan import StageSlice
from core.sampling.parameters import SamplingParameters
from core.weights.checkpoint import Checkpoint

BLOCK_SIZE = 16


@dataclass
class Run:
    """Rows of one sequence in the next micro-batch."""

    slot: int
    token_ids: Sequence[int]
    num_samples: int = 1
    first: int | None = None  # position of the first row; None: where the sequence ends


def even_slices(num_layers: int, num_stages: int) -> list[StageSlice]:
    """Cuts the layers into stages of nearly equal length."""
    edges = [num_layers * stage // num_stages for stage in range(num_stages + 1)]
    return [
        StageSlice(first_layer=first, end_layer=end, num_layers=num_layers)
        for first, end in pairwise(edges)
    ]


class Chain:
    """A model cut into `num_stages` engines."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        *,
        num_stages: int = 1,
        number_format: str = "fp32",
        num_slots: int = 32,
        num_kv_blocks: int = 1024,
        max_rows: int = 512,
        arithmetic: Arithmetic | None = None,
        wire: str = "f32",
        keeps_log: bool = False,
        num_threads: int = 1,
        make_backend: MakeBackend | None = None,
    ) -> None:
        """`arithmetic` overrides the host's best, `make_backend` the CPU."""
        settings = EngineSettings(
            number_format=number_format,
            num_kv_blocks=num_kv_blocks,
            num_slots=num_slots,
            max_rows=max_rows,
            wire=wire,
            keeps_log=keeps_log,
            num_threads=num_threads,
        )
        make_backend = make_backend or functools.partial(CpuBackend, arithmetic=arithmetic)
        self.engines = [
            Engine(checkpoint, config, stage_slice, settings, make_backend=make_backend)
            for stage_slice in even_slices(config.num_layers, num_stages)
        ]
        self.max_rows = max_rows
        self._free_blocks = list(range(num_kv_blocks))
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._started: list[SequenceStart] = []
        self._ended: list[int] = []
        self._added: list[tuple[int, int]] = []  # slots and blocks that the engines lack
        self._next_id = 0

    def start(
        self,
        slot: int,
        sampling: SamplingParameters,
        prompt: Sequence[int] = (),
        *,
        like_slot: int | None = None,
        num_cached: int = 0,
    ) -> None:
        """Begins a sequence; `prompt` is what penalties count.

        With `like_slot` its first `num_cached` positions are those of that live sequence.
        """
        shared = [] if like_slot is None else self._blocks[like_slot][: num_cached // BLOCK_SIZE]
        self._blocks[slot] = list(shared)
        self._added += [(slot, block) for block in shared]
        self._lengths[slot] = num_cached
        self._started.append(
            SequenceStart(
                slot=slot,
                request_id=slot,
                num_cached_positions=num_cached,
                sampling=sampling,
                known_token_ids=tuple(prompt),
                num_prompt_tokens=len(prompt),
            )
        )

    def end(self, slot: int) -> None:
        """Ends a sequence; its blocks may be handed out again at once."""
        blocks = self._blocks.pop(slot)
        held = {block for others in self._blocks.values() for block in others}
        self._free_blocks = [block for block in blocks if block not in held] + self._free_blocks
        del self._lengths[slot]
        self._ended.append(slot)

    def flush(self) -> None:
        """Tells the engines what has ended, which the next micro-batch would do otherwise."""
        for engine in self.engines:
            engine.apply(SequenceUpdates(ended_slots=tuple(self._ended)))
        self._ended = []

    def step(self, runs: Sequence[Run]) -> tuple[int, ...]:
        """Computes one micro-batch through all stages and returns the sampled tokens."""
        batch = self._micro_batch(runs)
        hidden = None
        for engine in self.engines[:-1]:
            hidden = engine.step(batch, hidden).hidden_TH
            assert hidden is not None
            hidden = hidden.copy()
        sampled = self.engines[-1].step(batch, hidden).sampled
        assert sampled is not None
        return sampled.token_ids

    def logits(
        self, token_ids: Sequence[int], *, chunk: int = 256, slot: int = 0
    ) -> npt.NDArray[np.float32]:
        """Teacher-forced logits [T, V] of one text, prefilled in chunks of `chunk` rows."""
        parts = self.logits_in_chunks(token_ids, chunk=chunk, slot=slot)
        return np.concatenate([part_TV.copy() for part_TV in parts])

    def logits_in_chunks(
        self, token_ids: Sequence[int], *, chunk: int, slot: int = 0
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Like `logits`, but a chunk at a time, each valid until the next."""
        self.start(slot, SamplingParameters(max_tokens=1, temperature=0.0))
        for first in range(0, len(token_ids), chunk):
            batch = self._micro_batch([Run(slot, token_ids[first : first + chunk], num_samples=0)])
            hidden = None
            for engine in self.engines[:-1]:
                hidden = engine.step(batch, hidden).hidden_TH
                assert hidden is not None
                hidden = hidden.copy()
            yield self.engines[-1].logits(batch, hidden)
        self.end(slot)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParameters],
        *,
        chunk: int = 256,
    ) -> list[list[int]]:
        """Generates max_tokens for every prompt, all in one batch, prefilling one prompt after
        the other while those before it decode."""
        outputs: list[list[int]] = [[] for _ in prompts]
        pending = [list(prompt) for prompt in prompts]
        for slot, (prompt, parameters) in enumerate(zip(prompts, sampling, strict=True)):
            self.start(slot, parameters, prompt)
        while True:
            runs: list[Run] = []
            prefilling = False
            for slot, output in enumerate(outputs):
                if pending[slot]:
                    if prefilling:
                        continue
                    prefilling = True
                    piece, pending[slot] = pending[slot][:chunk], pending[slot][chunk:]
                    runs.append(Run(slot, piece, num_samples=int(not pending[slot])))
                elif len(output) < sampling[slot].max_tokens:
                    runs.append(Run(slot, [output[-1]]))
            if not runs:
                break
            tokens = iter(self.step(runs))
            for run in runs:
                if run.num_samples:
                    outputs[run.slot].append(next(tokens))
        for slot in range(len(prompts)):
            self.end(slot)
        return outputs

    def _micro_batch(self, runs: Sequence[Run]) -> MicroBatch:
        firsts = []
        for run in runs:
            first = self._lengths[run.slot] if run.first is None else run.first
            firsts.append(first)
            self._lengths[run.slot] = first + len(run.token_ids)
            blocks = self._blocks[run.slot]
            while len(blocks) * BLOCK_SIZE < self._lengths[run.slot]:
                blocks.append(self._free_blocks.pop(0))
                self._added.append((run.slot, blocks[-1]))
        updates = SequenceUpdates(
            ended_slots=tuple(self._ended),
            starts=tuple(self._started),
            block_slots=tuple(slot for slot, _ in self._added),
            block_ids=tuple(block for _, block in self._added),
        )
        self._ended, self._started, self._added = [], [], []
        self._next_id += 1
        return MicroBatch(
            id=self._next_id,
            slots_R=np.array([run.slot for run in runs], np.int32),
            first_positions_R=np.array(firsts, np.int32),
            num_rows_R=np.array([len(run.token_ids) for run in runs], np.int32),
            num_samples_R=np.array([run.num_samples for run in runs], np.int32),
            token_ids_T=np.array([t for run in runs for t in run.token_ids], np.int32),
            updates=updates,
        )
