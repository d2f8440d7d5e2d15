"""One stage's slice of a model with its KV cache: micro-batches in, activations or tokens out.

Letters: T rows, H hidden size, as the wire's codec has it, R runs, S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.engine.activation_log import ActivationLog
from core.engine.backend import MakeBackend, StageOutputs, StageRows
from core.engine.cpu_backend import CpuBackend
from core.engine.sequences import BLOCK_SIZE, SequenceTable
from core.engine.settings import EngineSettings
from core.engine.stage_memory import kv_bytes_per_block
from core.errors import InvalidInput, ProtocolViolation
from core.models.llama.config import LlamaConfig
from core.pipeline.batch import (
    NO_TOKEN,
    MicroBatch,
    PositionLogprobs,
    SampledTokens,
    SequenceUpdates,
)
from core.pipeline.plan import StageSlice
from core.weights.checkpoint import Checkpoint

__all__ = ["Engine", "EngineSettings", "StepResult", "kv_bytes_per_block"]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A micro-batch that has been checked, and what of it is to be computed."""

    batch: MicroBatch
    rows: StageRows
    slots_S: npt.NDArray[np.int32]
    rows_S: npt.NDArray[np.int32]
    is_greedy_S: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step computed: activations, or on the last stage the tokens that were asked for."""

    hidden_TH: npt.NDArray[Any] | None = None
    sampled: SampledTokens | None = None


class Engine:
    """Computes the micro-batches of one stage. To be used by one thread at a time.

    A row's result depends on its sequence alone: not on the rows beside it, the size of
    prefill chunks, the blocks that hold its keys and values, or (but for a wire in int8, which
    rounds there) where the model is cut.
    What computes them is the backend: this class keeps the sequences and asks for tokens.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        stage_slice: StageSlice,
        settings: EngineSettings,
        *,
        make_backend: MakeBackend = CpuBackend,
    ) -> None:
        """Raises CorruptWeights, InvalidInput, and what making the backend raises."""
        _check_slice(stage_slice, config)
        self.config = config
        self.stage_slice = stage_slice
        self.settings = settings
        context_length = min(
            settings.context_length or config.context_length, config.context_length
        )
        num_positions = min(context_length, settings.num_kv_blocks * BLOCK_SIZE)
        self._sequences = SequenceTable(
            num_slots=settings.num_slots,
            num_kv_blocks=settings.num_kv_blocks,
            context_length=num_positions,
        )
        self._backend = make_backend(
            checkpoint, config, stage_slice, settings, num_positions=num_positions
        )
        self._sampler = self._backend.make_sampler() if stage_slice.is_last else None
        self._log = _make_log(config, settings) if self.keeps_log else None
        self._can_sample_S = np.zeros(settings.num_slots, np.bool_)
        self._is_greedy_S = np.zeros(settings.num_slots, np.bool_)
        self._counts_tokens_S = np.zeros(settings.num_slots, np.bool_)
        self._slots_T, self._positions_T, self._token_ids_T = (
            np.zeros(settings.max_rows, np.int32) for _ in range(3)
        )
        self._all_rows = np.arange(settings.max_rows, dtype=np.int32)
        self._no_rows = np.zeros(0, np.int32)
        self._prepared: _Prepared | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return self._backend.weights_bytes

    @property
    def weight_arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """The weights in the host's memory, by names for people; nobody writes to them."""
        return self._backend.weight_arrays

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block over all layers of the stage, and in its log."""
        return kv_bytes_per_block(self.config, self.stage_slice, self.settings)

    @property
    def kv_block_size(self) -> int:
        """Positions in a KV block."""
        return BLOCK_SIZE

    @property
    def keeps_log(self) -> bool:
        """Whether what it sends can be sent again."""
        return self.settings.keeps_log and not self.stage_slice.is_last

    @property
    def codec(self) -> str:
        """How activations leave and arrive; see `core.wire.codecs`."""
        return self.settings.wire

    @property
    def fingerprint(self) -> str:
        """Two engines with equal fingerprints and weights compute the same bits."""
        return self._backend.fingerprint

    def apply(self, updates: SequenceUpdates) -> None:
        """Ends and starts sequences, gives them blocks and rewinds them.

        Raises ProtocolViolation, with nothing changed, where that does not fit.
        """
        self._sequences.apply(updates)
        if self._sampler is None:
            return
        for slot in updates.ended_slots:
            if self._can_sample_S[slot] and not self._is_greedy_S[slot]:
                self._sampler.end(slot)
            self._can_sample_S[slot] = False
        for start in updates.starts:
            sampling = start.sampling
            if sampling is None:
                continue
            self._can_sample_S[start.slot] = True
            self._is_greedy_S[start.slot] = (
                sampling.is_greedy and not sampling.has_penalties and sampling.logprobs is None
            )
            self._counts_tokens_S[start.slot] = sampling.has_penalties
            if not self._is_greedy_S[start.slot]:
                self._sampler.start(
                    start.slot, sampling, start.known_token_ids, start.num_prompt_tokens
                )
        for slot, position in zip(updates.rewind_slots, updates.rewind_positions, strict=True):
            self._sampler.rewind(slot, position)

    def prepare(self, batch: MicroBatch) -> None:
        """Does what of a step needs no activations, for a stage that waits for them.

        Applies the batch's updates. What follows is the batch's `step`, or it is not computed at
        all. Raises ProtocolViolation.
        """
        self._prepared = None
        self._prepared = self._prepare(batch)

    def step(self, batch: MicroBatch, hidden_TH: npt.NDArray[Any] | None) -> StepResult:
        """Applies the batch's updates and computes it, or returns what is to be sent again.

        `hidden_TH` is None on the first stage, and for what is replayed; else rows in the wire's
        codec. The result's array is valid until the next step. Raises ProtocolViolation.
        """
        prepared, self._prepared = self._prepared, None
        if batch.replays:
            return StepResult(hidden_TH=self._replay(batch))
        if prepared is None or prepared.batch is not batch:
            prepared = self._prepare(batch)
        outputs = self._run(prepared, hidden_TH)
        if self._sampler is not None:
            return StepResult(sampled=self._sample(prepared, outputs))
        num_rows = prepared.rows.num_rows
        rows_TH = self._backend.give(num_rows)
        if self._log is not None:
            self._log.write(self._places(num_rows), rows_TH)
        return StepResult(hidden_TH=rows_TH)

    def logits(
        self, batch: MicroBatch, hidden_TH: npt.NDArray[Any] | None
    ) -> npt.NDArray[np.float32]:
        """As `step`, on the last stage, but returns the logits [T, V] of all rows.

        Valid until the next step. Nothing is sampled.
        """
        if self._sampler is None:
            raise InvalidInput("stage", self.stage_slice.end_layer, "the last stage")
        prepared = self._prepare(batch, wants_logits=True)
        outputs = self._run(prepared, hidden_TH)
        return self._backend.host_logits(outputs, prepared.rows.num_rows)

    def _prepare(self, batch: MicroBatch, *, wants_logits: bool = False) -> _Prepared:
        """Checks the batch, lays its rows out and shows them to the backend.

        `wants_logits` of all rows, in place of what is to be sampled.
        """
        self.apply(batch.updates)
        num_rows = self._sequences.check(batch, max_rows=self.settings.max_rows)
        if self.stage_slice.is_first:
            self._take_token_ids(batch, num_rows)
        self._lay_out(batch, num_rows)
        slots_S = rows_S = self._no_rows
        if wants_logits:
            rows_S = self._all_rows[:num_rows]
        elif self._sampler is not None:
            slots_S, rows_S = np.repeat(batch.slots_R, batch.num_samples_R), _sampled_rows(batch)
            self._check_sampling(batch, slots_S)
        is_greedy_S = np.zeros(num_rows, np.bool_) if wants_logits else self._is_greedy_S[slots_S]
        rows = StageRows(
            num_rows=num_rows,
            is_alone=batch.is_alone,
            token_ids_T=self._token_ids_T,
            slots_T=self._slots_T,
            positions_T=self._positions_T,
            block_tables_SB=self._sequences.block_tables_SB,
            greedy_rows=rows_S[is_greedy_S],
            logits_rows=rows_S[~is_greedy_S],
        )
        self._backend.prepare(rows)
        return _Prepared(
            batch=batch, rows=rows, slots_S=slots_S, rows_S=rows_S, is_greedy_S=is_greedy_S
        )

    def _check_sampling(self, batch: MicroBatch, slots_S: npt.NDArray[np.int32]) -> None:
        if not self._can_sample_S[slots_S].all():
            raise ProtocolViolation("a token is wanted of a sequence without sampling parameters")
        if self._counts_tokens_S[batch.slots_R[batch.num_samples_R > 1]].any():
            raise ProtocolViolation("guesses are to be verified where penalties count tokens")

    def _run(self, prepared: _Prepared, hidden_TH: npt.NDArray[Any] | None) -> StageOutputs:
        if not self.stage_slice.is_first:
            self._backend.take(hidden_TH, num_rows=prepared.rows.num_rows)
        outputs = self._backend.run(prepared.rows)
        self._sequences.advance(prepared.batch)
        return outputs

    def _replay(self, batch: MicroBatch) -> npt.NDArray[Any]:
        """The rows that were sent when the batch's positions were computed."""
        if self._log is None:
            raise ProtocolViolation("this stage keeps no log to send anything again from")
        self.apply(batch.updates)
        num_rows = self._sequences.check_replay(batch, max_rows=self.settings.max_rows)
        self._lay_out(batch, num_rows)
        return self._log.read(self._places(num_rows))

    def _lay_out(self, batch: MicroBatch, num_rows: int) -> None:
        """Notes slot and position of each row."""
        num_rows_R = batch.num_rows_R
        start_R = np.cumsum(num_rows_R) - num_rows_R
        self._slots_T[:num_rows] = np.repeat(batch.slots_R, num_rows_R)
        self._positions_T[:num_rows] = np.repeat(batch.first_positions_R - start_R, num_rows_R)
        self._positions_T[:num_rows] += self._all_rows[:num_rows]

    def _places(self, num_rows: int) -> npt.NDArray[np.int64]:
        return self._sequences.places(self._slots_T[:num_rows], self._positions_T[:num_rows])

    def _take_token_ids(self, batch: MicroBatch, num_rows: int) -> None:
        token_ids_T = np.asarray(batch.token_ids_T)
        if token_ids_T.shape != (num_rows,) or token_ids_T.dtype.kind not in "iu":
            raise ProtocolViolation(f"{num_rows} rows have token ids of shape {token_ids_T.shape}")
        if token_ids_T.min() < 0 or token_ids_T.max() >= self.config.vocab_size:
            raise ProtocolViolation(f"a token id is not below {self.config.vocab_size}")
        self._token_ids_T[:num_rows] = token_ids_T

    def _sample(self, prepared: _Prepared, outputs: StageOutputs) -> SampledTokens:
        """Tokens of the sampled rows, in order, from what the call left in the outputs."""
        assert self._sampler is not None
        rows_S, is_greedy_S = prepared.rows_S, prepared.is_greedy_S
        tokens_S = np.empty(len(rows_S), np.int64)
        logprobs_S: list[PositionLogprobs | None] = [None] * len(rows_S)
        has_logprobs = False
        tokens_S[is_greedy_S] = outputs.greedy_tokens_S[: int(is_greedy_S.sum())]
        drawn = np.flatnonzero(~is_greedy_S)
        if len(drawn):
            token_ids, logprobs = self._sampler.sample(
                outputs.logits_SV,
                prepared.slots_S[drawn].astype(np.int32),
                self._positions_T[rows_S[drawn]] + 1,
            )
            tokens_S[drawn] = token_ids
            has_logprobs = bool(logprobs)
            for at, entry in zip(drawn, logprobs, strict=False):
                logprobs_S[at] = entry
        order_S = np.concatenate([np.flatnonzero(is_greedy_S), drawn])
        tokens_S[order_S[~outputs.is_finite_S]] = NO_TOKEN
        return SampledTokens(
            micro_batch_id=prepared.batch.id,
            token_ids=tuple(tokens_S.tolist()),
            logprobs=tuple(logprobs_S) if has_logprobs else (),
        )


def _sampled_rows(batch: MicroBatch) -> npt.NDArray[np.int32]:
    """The last rows of each run, as many as it samples."""
    num_samples_R = batch.num_samples_R
    before_R = np.cumsum(batch.num_rows_R) - np.cumsum(num_samples_R)
    rows_S = np.repeat(before_R, num_samples_R) + np.arange(num_samples_R.sum())
    return rows_S.astype(np.int32)


def _make_log(config: LlamaConfig, settings: EngineSettings) -> ActivationLog:
    return ActivationLog(
        num_places=settings.num_kv_blocks * BLOCK_SIZE,
        hidden_size=config.hidden_size,
        wire=settings.wire,
    )


def _check_slice(stage_slice: StageSlice, config: LlamaConfig) -> None:
    if not 0 <= stage_slice.first_layer < stage_slice.end_layer <= config.num_layers:
        shown = f"{stage_slice.first_layer}:{stage_slice.end_layer}"
        raise InvalidInput("layers", shown, f"a non-empty range within 0:{config.num_layers}")
