"""Reads the tokens of others back from the activations that a stage sends on.

What any stage but the first can do, or whoever listens at its link: it needs the weights of the
layers before it and nothing secret. A linear map, fitted on random tokens, guesses each row's
embedding, and so which tokens are likely; running them behind the prefix that is known so far says
which it was, since equal tokens have equal activations.

Letters: T rows, H hidden size, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from core.engine.engine import Engine, EngineSettings
from core.engine.sequences import BLOCK_SIZE
from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import read_embedding
from core.pipeline.batch import MicroBatch, SequenceStart, SequenceUpdates
from core.pipeline.plan import StageSlice
from core.weights.checkpoint import Checkpoint

Floats = npt.NDArray[np.float32]
# What happens to rows on their way to whoever reads them.
Lossy = Callable[[Floats], Floats]

MOST_CANDIDATES = 8192
_LONGEST_TEXT = 64
_BLOCKS_A_TEXT = -(-_LONGEST_TEXT // BLOCK_SIZE)
_MOST_TEXTS = 32  # a row costs nearly as much as so many
_RIDGE = 1e-3  # of the variance


def unchanged(rows_TH: Floats) -> Floats:
    return rows_TH


def rounded_to_int8(rows_TH: Floats) -> Floats:
    """Each row in 255 steps, as a wire in int8 would carry it."""
    scale_T1 = np.abs(rows_TH).max(axis=1, keepdims=True) / 127
    return np.rint(rows_TH / scale_T1) * scale_T1


class FirstStage:
    """The layers up to a cut, as the victim runs them, and as whoever has the weights can."""

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, *, end_layer: int) -> None:
        self.embedding_VH: Floats = read_embedding(checkpoint, config)
        self._engine = Engine(
            checkpoint,
            config,
            StageSlice(first_layer=0, end_layer=end_layer, num_layers=config.num_layers),
            EngineSettings(
                number_format="bf16",
                wire="bf16",
                num_slots=_MOST_TEXTS,
                num_kv_blocks=_MOST_TEXTS * _BLOCKS_A_TEXT,
                max_rows=_MOST_TEXTS * _LONGEST_TEXT,
            ),
        )

    def run(self, texts: Sequence[Sequence[int]]) -> Floats:
        """The activations [T, H] behind the cut, of all texts in turn."""
        groups = [texts[i : i + _MOST_TEXTS] for i in range(0, len(texts), _MOST_TEXTS)]
        return np.concatenate([self._run_at_once(group) for group in groups])

    def begin(self) -> None:
        """Begins one text, in all slots alike, for `try_tokens`."""
        self._engine.apply(_starts(_MOST_TEXTS))

    def end(self) -> None:
        self._engine.apply(SequenceUpdates(ended_slots=tuple(range(_MOST_TEXTS))))

    def keep(self, token_id: int, *, position: int) -> None:
        """Goes on with a token, in place of those that were tried there."""
        self.try_tokens([token_id] * _MOST_TEXTS, position=position)

    def try_tokens(self, token_ids: Sequence[int], *, position: int) -> Floats:
        """The activations of each of these tokens behind those kept at the positions before."""
        slots = tuple(range(len(token_ids)))
        forget = SequenceUpdates(rewind_slots=slots, rewind_positions=(position,) * len(slots))
        return self._step([[id] for id in token_ids], first=position, updates=forget)

    def _run_at_once(self, texts: Sequence[Sequence[int]]) -> Floats:
        rows_TH = self._step(texts, first=0, updates=_starts(len(texts)))
        self._engine.apply(SequenceUpdates(ended_slots=tuple(range(len(texts)))))
        return rows_TH

    def _step(
        self, texts: Sequence[Sequence[int]], *, first: int, updates: SequenceUpdates
    ) -> Floats:
        num_rows_R = np.array([len(text) for text in texts], np.int32)
        batch = MicroBatch(
            id=1,
            slots_R=np.arange(len(texts), dtype=np.int32),
            first_positions_R=np.full_like(num_rows_R, first),
            num_rows_R=num_rows_R,
            num_samples_R=np.zeros_like(num_rows_R),
            token_ids_T=np.concatenate([np.asarray(text, np.int32) for text in texts]),
            updates=updates,
        )
        bits_TH = self._engine.step(batch, None).hidden_TH
        assert bits_TH is not None
        return (bits_TH.astype(np.uint32) << 16).view(np.float32)


class Inverter:
    """Knows the first stage's weights, and sees what comes out of it for others."""

    def __init__(self, stage: FirstStage, *, num_texts: int, seed: int = 1) -> None:
        self._stage = stage
        shape = (num_texts, _LONGEST_TEXT)
        texts = np.random.default_rng(seed).integers(len(stage.embedding_VH), size=shape)
        rows_TH = stage.run(texts.tolist())
        self._mean_H, self._scale_H = rows_TH.mean(axis=0), rows_TH.std(axis=0) + 1e-6
        centred_VH = stage.embedding_VH - stage.embedding_VH.mean(axis=0)
        lengths_V1 = np.linalg.norm(centred_VH, axis=1, keepdims=True)
        self._directions_VH = centred_VH / np.maximum(lengths_V1, 1e-9)
        inputs_TH = self._standardised(rows_TH)
        covariance_HH = inputs_TH.T @ inputs_TH
        covariance_HH += _RIDGE * len(inputs_TH) * np.eye(len(covariance_HH), dtype=np.float32)
        targets_TH = self._directions_VH[texts.ravel()]
        self._map_HH = np.linalg.solve(covariance_HH, inputs_TH.T @ targets_TH)

    def recover(
        self, seen_TH: Floats, *, known: Sequence[int], lossy: Lossy = unchanged
    ) -> list[int]:
        """The tokens whose activations, after `lossy`, were seen behind those `known`."""
        self._stage.begin()
        for position, token_id in enumerate(known):
            self._stage.keep(token_id, position=position)
        recovered = []
        for position, row_H in enumerate(seen_TH, start=len(known)):
            recovered.append(self._find(row_H, position=position, lossy=lossy))
            self._stage.keep(recovered[-1], position=position)
        self._stage.end()
        return recovered

    def _find(self, row_H: Floats, *, position: int, lossy: Lossy) -> int:
        """The likeliest candidate that yields this row; else the one that comes closest."""
        closest, least = 0, np.inf
        candidates = self._candidates(row_H)
        for first in range(0, len(candidates), _MOST_TEXTS):
            some = candidates[first : first + _MOST_TEXTS]
            tried_CH = lossy(self._stage.try_tokens(some, position=position))
            distances_C = np.abs(tried_CH - row_H).sum(axis=1)
            if distances_C.min() < least:
                closest, least = some[int(distances_C.argmin())], distances_C.min()
            if least == 0:
                break
        return closest

    def _candidates(self, row_H: Floats) -> list[int]:
        scores_V = self._directions_VH @ (self._standardised(row_H) @ self._map_HH)
        return np.argsort(-scores_V)[:MOST_CANDIDATES].tolist()

    def _standardised(self, rows: Floats) -> Floats:
        return (rows - self._mean_H) / self._scale_H


def _starts(num_texts: int) -> SequenceUpdates:
    """Begins texts in the first slots, with room for the longest."""
    blocks = range(num_texts * _BLOCKS_A_TEXT)
    return SequenceUpdates(
        starts=tuple(SequenceStart(slot=slot, request_id=slot) for slot in range(num_texts)),
        block_slots=tuple(block // _BLOCKS_A_TEXT for block in blocks),
        block_ids=tuple(blocks),
    )
