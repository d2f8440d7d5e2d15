"""Chooses the next token of every sequence whose run the last stage has finished.

The kernel says what is computed, and in which order: `core.kernels.sampling.reference`.
This module imports numba; callers that only need parameters, validation or stop conditions
import those modules instead.

Letters: S rows, N slots, V vocabulary, M distinct tokens known of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.kernels.sampling.cpu import log_probabilities, sample_rows
from core.sampling.logprobs import PositionLogprobs
from core.sampling.parameters import SamplingParameters

NO_LOGPROBS = -1
NO_HISTORY = -1
FIRST_CAPACITY = 256


class Sampler:
    """Parameters and, where penalties need it, the tokens of the sequences in every slot.

    Construction compiles the kernels, or loads them from numba's cache. Used by one thread
    at a time. A token depends on its row of logits, its sequence's
    parameters, history and position, and on nothing else in the batch.
    """

    def __init__(self, vocab_size: int, num_slots: int) -> None:
        self._vocab_size = vocab_size
        self._temperatures_N = np.zeros(num_slots, np.float64)
        self._top_ks_N = np.zeros(num_slots, np.int64)
        self._top_ps_N = np.ones(num_slots, np.float64)
        self._min_ps_N = np.zeros(num_slots, np.float64)
        self._seeds_N = np.zeros(num_slots, np.uint64)
        self._penalties_N3 = np.zeros((num_slots, 3), np.float32)
        self._num_logprobs_N = np.full(num_slots, NO_LOGPROBS, np.int32)
        # Distinct tokens known, how often each was generated, and how many there are.
        self._history_ids_NM = np.zeros((num_slots, 0), np.int32)
        self._history_counts_NM = np.zeros((num_slots, 0), np.int32)
        self._history_lengths_N = np.full(num_slots, NO_HISTORY, np.int32)
        # Where penalties count them: the tokens drawn since the start, with their positions.
        self._drawn_of: dict[int, list[tuple[int, int]]] = {}
        self._num_known_N = np.zeros(num_slots, np.int32)  # distinct tokens at the start
        self._warm_up()

    def start(
        self,
        slot: int,
        parameters: SamplingParameters,
        known_token_ids: Sequence[int] = (),
        num_prompt_tokens: int = 0,
    ) -> None:
        """Begins a sequence. Of the known tokens the first `num_prompt_tokens` are its prompt,
        the others were generated before; only penalties need them."""
        self._temperatures_N[slot] = parameters.temperature
        self._top_ks_N[slot] = parameters.top_k
        self._top_ps_N[slot] = parameters.top_p
        self._min_ps_N[slot] = parameters.min_p
        self._seeds_N[slot] = parameters.seed
        self._penalties_N3[slot] = (
            parameters.repetition_penalty,
            parameters.presence_penalty,
            parameters.frequency_penalty,
        )
        num_logprobs = parameters.logprobs
        self._num_logprobs_N[slot] = NO_LOGPROBS if num_logprobs is None else num_logprobs
        self._history_lengths_N[slot] = NO_HISTORY
        self._drawn_of.pop(slot, None)
        if parameters.has_penalties:
            self._drawn_of[slot] = []
            self._remember(slot, np.asarray(known_token_ids, np.int32), num_prompt_tokens)

    def end(self, slot: int) -> None:
        """Forgets the sequence in a slot."""
        self._drawn_of.pop(slot, None)
        self._history_lengths_N[slot] = NO_HISTORY
        self._num_logprobs_N[slot] = NO_LOGPROBS

    def rewind(self, slot: int, position: int) -> None:
        """Takes back the tokens drawn for positions behind this one: they are to be drawn again."""
        drawn = self._drawn_of.get(slot, [])
        while drawn and drawn[-1][0] > position:
            self._uncount(slot, drawn.pop()[1])

    def sample(
        self,
        logits_SV: npt.NDArray[np.float32],
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> tuple[list[int], tuple[PositionLogprobs | None, ...]]:
        """The token after each row, for position `positions[s]` of the sequence in `slots[s]`.

        Logits end as they began; those that are not float32 in C order are copied first. The
        log probabilities have an entry a row where any row asked for them, else none at all.
        """
        assert logits_SV.shape == (len(slots), self._vocab_size)
        # Other types, strides or read-only arrays would compile the kernel anew, in the middle of
        # a request.
        logits_SV = np.ascontiguousarray(logits_SV, np.float32)
        slots, positions = np.array(slots, np.int32), np.array(positions, np.int32)
        self._reserve(int(self._history_lengths_N[slots].max(initial=NO_HISTORY)) + 1)
        token_ids_S = np.empty(len(slots), np.int32)
        sample_rows(
            logits_SV,
            slots,
            positions,
            self._temperatures_N,
            self._top_ks_N,
            self._top_ps_N,
            self._min_ps_N,
            self._seeds_N,
            self._penalties_N3,
            self._history_ids_NM,
            self._history_counts_NM,
            self._history_lengths_N,
            token_ids_S,
        )
        token_ids: list[int] = token_ids_S.tolist()
        for index in np.flatnonzero(self._history_lengths_N[slots] != NO_HISTORY):
            drawn = self._drawn_of[int(slots[index])]
            drawn.append((int(positions[index]), token_ids[index]))
        num_logprobs_S = self._num_logprobs_N[slots]
        if not (num_logprobs_S >= 0).any():
            return token_ids, ()
        rows = zip(logits_SV, token_ids, num_logprobs_S.tolist(), strict=True)
        return token_ids, tuple(_position_logprobs(*row) for row in rows)

    def _warm_up(self) -> None:
        """Samples once with every kernel, so that no request waits for a compiler."""
        self._num_logprobs_N[0] = 0
        slot = np.zeros(1, np.int32)
        self.sample(np.zeros((1, self._vocab_size), np.float32), slot, slot)
        self._num_logprobs_N[0] = NO_LOGPROBS

    def _remember(self, slot: int, ids_M: npt.NDArray[np.int32], num_prompt_tokens: int) -> None:
        distinct, inverse = np.unique(ids_M, return_inverse=True)
        generated = inverse[num_prompt_tokens:]
        self._reserve(len(distinct) + 1)
        self._history_ids_NM[slot, : len(distinct)] = distinct
        self._history_counts_NM[slot, : len(distinct)] = np.bincount(
            generated, minlength=len(distinct)
        )
        self._history_lengths_N[slot] = self._num_known_N[slot] = len(distinct)

    def _uncount(self, slot: int, token_id: int) -> None:
        """Undoes the latest counting of a token.

        Tokens that were not known at the start stand behind those that were, in the order in which
        they first came: one that is left uncounted is the last.
        """
        length = self._history_lengths_N[slot]
        index = int(np.flatnonzero(self._history_ids_NM[slot, :length] == token_id)[0])
        self._history_counts_NM[slot, index] -= 1
        if index >= self._num_known_N[slot] and not self._history_counts_NM[slot, index]:
            self._history_lengths_N[slot] = length - 1

    def _reserve(self, length: int) -> None:
        """Makes room for histories of `length` tokens. Without penalties none is ever needed."""
        num_slots, capacity = self._history_ids_NM.shape
        if length <= capacity:
            return
        added = max(FIRST_CAPACITY, capacity, length - capacity)
        room = np.zeros((num_slots, added), np.int32)
        self._history_ids_NM = np.concatenate([self._history_ids_NM, room], axis=1)
        self._history_counts_NM = np.concatenate([self._history_counts_NM, room], axis=1)


def _position_logprobs(
    logits_V: npt.NDArray[np.float32], token_id: int, num_top: int
) -> PositionLogprobs | None:
    if num_top == NO_LOGPROBS:
        return None
    num_top = min(num_top, len(logits_V))
    top_ids, top_logprobs = np.empty(num_top, np.int32), np.empty(num_top, np.float64)
    logprob = log_probabilities(logits_V, token_id, num_top, top_ids, top_logprobs)
    return PositionLogprobs(
        token_id=token_id,
        logprob=float(logprob),
        top_token_ids=tuple(top_ids.tolist()),
        top_logprobs=tuple(top_logprobs.tolist()),
    )
