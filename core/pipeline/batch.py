"""A micro-batch as stages compute it: ragged runs of rows, and the changes before it.

The arrays mirror `penstock.v1.MicroBatch`; services translate between the two.

Letters: R runs, T rows (tokens) in all, B new blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# Sampling makes log probabilities, and may not import this module; it is theirs.
from core.sampling.logprobs import PositionLogprobs as PositionLogprobs
from core.sampling.parameters import SamplingParameters

NO_TOKEN = (1 << 32) - 1  # the greatest that the message can carry; no vocabulary is so big


@dataclass(frozen=True, kw_only=True)
class SequenceStart:
    """A sequence begins in `slot`. `sampling` and `known_token_ids` reach the last stage only.

    Its first `num_cached_positions` positions, whole blocks, were computed for others: the
    first of its blocks hold them, and its first run goes on after them.
    """

    slot: int
    request_id: int
    num_cached_positions: int = 0
    sampling: SamplingParameters | None = None
    known_token_ids: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True)
class SequenceUpdates:
    """Changes to mirrored sequences, applied in this order: ends, starts, blocks, rewinds.

    A rewind makes a sequence forget what it computed from a position on; where it has not come so
    far, it forgets nothing.
    """

    ended_slots: tuple[int, ...] = ()
    starts: tuple[SequenceStart, ...] = ()
    block_slots: tuple[int, ...] = ()
    block_ids: tuple[int, ...] = ()  # same length as block_slots, in order of position
    rewind_slots: tuple[int, ...] = ()
    rewind_positions: tuple[int, ...] = ()  # same length as rewind_slots


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Runs of consecutive rows of several sequences.

    `num_samples_R[r]` asks for a token after each of the last rows of run r; more than one
    verify guessed tokens. `token_ids_T` is empty except on the first stage. One that `replays`
    computes nothing: the stage sends the activations of these rows again, from its log. `is_alone`:
    nothing else was in flight that could be computed meanwhile.
    """

    id: int
    slots_R: npt.NDArray[np.int32]
    first_positions_R: npt.NDArray[np.int32]
    num_rows_R: npt.NDArray[np.int32]
    num_samples_R: npt.NDArray[np.int32]
    token_ids_T: npt.NDArray[np.int32]
    updates: SequenceUpdates = field(default_factory=SequenceUpdates)
    replays: bool = False
    is_alone: bool = False

    @property
    def num_rows(self) -> int:
        return int(self.num_rows_R.sum())


@dataclass(frozen=True, kw_only=True)
class SampledTokens:
    """Tokens of a micro-batch: one per sampled row, in order; NO_TOKEN where a row's result was NaN
    or infinite."""

    micro_batch_id: int
    token_ids: tuple[int, ...]
    # Same length as token_ids where any run asked for log probabilities, else empty.
    logprobs: tuple[PositionLogprobs | None, ...] = ()
