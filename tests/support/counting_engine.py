"""An engine whose arithmetic a test can follow: every stage adds one.

A row (of 4 elements, unless told otherwise) starts as (token id, position, 0, 0); every
stage adds 1 to the third element; the last one samples token id + position + number of stages.
What a stage sends it can send again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import ProtocolViolation
from core.pipeline.batch import MicroBatch, PositionLogprobs, SampledTokens, SequenceUpdates
from services.stage.model import LoadedModel

HIDDEN_SIZE = 4
CONTEXT_LENGTH = 4096
POISON = 666  # a token id that makes the engine fail


@dataclass(frozen=True, kw_only=True)
class CountingResult:
    hidden_TH: np.ndarray | None = None
    sampled: SampledTokens | None = None


class CountingEngine:
    """Computes as described above; `gate`, when cleared, holds every step."""

    def __init__(self, *, is_first: bool, is_last: bool, hidden_size: int = HIDDEN_SIZE) -> None:
        self.hidden_size = hidden_size
        self.is_first = is_first
        self.is_last = is_last
        self.gate = threading.Event()
        self.gate.set()
        self.live: set[int] = set()
        self.steps: list[int] = []
        self.threads: set[int] = set()
        self.rewound: list[tuple[int, int]] = []
        self.prepared: list[int] = []
        self._prepared: MicroBatch | None = None
        self._log: dict[tuple[int, int], np.ndarray] = {}
        self._buffer_TH = np.zeros((0, hidden_size), np.float32)

    def apply(self, updates: SequenceUpdates) -> None:
        self.threads.add(threading.get_ident())
        if len(set(updates.ended_slots)) < len(updates.ended_slots):
            raise ProtocolViolation("a slot ends twice")
        for slot in updates.ended_slots:
            if slot not in self.live:
                raise ProtocolViolation(f"slot {slot} is not live")
            self.live.remove(slot)
        for start in updates.starts:
            if start.slot in self.live:
                raise ProtocolViolation(f"slot {start.slot} is live already")
            self.live.add(start.slot)
        self.rewound += zip(updates.rewind_slots, updates.rewind_positions, strict=True)

    def prepare(self, batch: MicroBatch) -> None:
        self._prepared = None
        self.apply(batch.updates)
        self._prepared = batch
        self.prepared.append(batch.id)

    def step(self, batch: MicroBatch, hidden_TH: np.ndarray | None) -> CountingResult:
        prepared, self._prepared = self._prepared, None
        if prepared is not batch:
            self.apply(batch.updates)
        assert self.gate.wait(60), "the test never opened the gate"
        if POISON in batch.token_ids_T:
            raise RuntimeError("the secret of the engine")
        missing = set(batch.slots_R.tolist()) - self.live
        if missing:
            raise ProtocolViolation(f"slots {missing} are not live")
        self.steps.append(batch.id)
        if batch.replays:
            return CountingResult(
                hidden_TH=np.stack([self._log[place] for place in _places(batch)])
            )
        rows_TH = self._embed(batch) if hidden_TH is None else hidden_TH.copy()
        rows_TH[:, 2] += 1
        # The result is valid until the next step only, as the real engine's is.
        self._buffer_TH[:] = np.nan
        self._buffer_TH = rows_TH
        self._log |= zip(_places(batch), rows_TH.copy(), strict=True)
        return self._sampled(batch, rows_TH) if self.is_last else CountingResult(hidden_TH=rows_TH)

    def _embed(self, batch: MicroBatch) -> np.ndarray:
        rows_TH = np.zeros((batch.num_rows, self.hidden_size), np.float32)
        rows_TH[:, 0] = batch.token_ids_T
        rows_TH[:, 1] = [position for _, position in _places(batch)]
        return rows_TH

    def _sampled(self, batch: MicroBatch, rows_TH: np.ndarray) -> CountingResult:
        tokens_T = rows_TH[:, :3].sum(axis=1).astype(int)
        ends = np.cumsum(batch.num_rows_R).tolist()
        token_ids = tuple(
            int(token)
            for end, count in zip(ends, batch.num_samples_R.tolist(), strict=True)
            for token in tokens_T[end - count : end]
        )
        logprobs = tuple(
            PositionLogprobs(token_id=id, logprob=-1.0, top_token_ids=(1,), top_logprobs=(-0.5,))
            if id % 2
            else None
            for id in token_ids
        )
        return CountingResult(
            sampled=SampledTokens(micro_batch_id=batch.id, token_ids=token_ids, logprobs=logprobs)
        )


def _places(batch: MicroBatch) -> list[tuple[int, int]]:
    """Slot and position of each row."""
    runs = zip(
        batch.slots_R.tolist(),
        batch.first_positions_R.tolist(),
        batch.num_rows_R.tolist(),
        strict=True,
    )
    return [(slot, first + row) for slot, first, num_rows in runs for row in range(num_rows)]


def counting_model(engine: CountingEngine, *, index: int, num_stages: int) -> LoadedModel:
    """Returns `engine` as stage `index` of a model with one layer a stage."""
    manifest = stage_pb2.StageReady(
        model="fake",
        first_layer=index,
        end_layer=index + 1,
        num_layers=num_stages,
        hidden_size=engine.hidden_size,
        vocab_size=1000,
        context_length=CONTEXT_LENGTH,
        number_format="fp32",
        codec=tensor_pb2.CODEC_F32,
        kv_block_size=16,
        num_kv_blocks=100,
        max_rows=512,
        weights_bytes=12345,
        layer_digests=[f"w{index}"],
    )
    return LoadedModel(engine=engine, manifest=manifest, codec="f32")
