"""What the scheduler wants done, in the order given.

Letters: R runs, T rows (tokens) in all, S stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from core.errors import PenstockError
from core.pipeline.batch import MicroBatch, PositionLogprobs, SequenceUpdates


class FinishReason(Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request cost. The durations follow each other and sum to its life so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float  # from arrival to the first scheduled chunk
    prefill_s: float  # from there to the first token
    decode_s: float  # from the first token to the last


@dataclass(kw_only=True, slots=True)
class RunMicroBatch:
    """Compute a micro-batch on every stage of the path.

    The runs are the same for all stages; `updates_S` has each stage's own (its block ids; the
    last stage's starts carry sampling). Plain lists, because they go straight into messages.
    """

    micro_batch_id: int
    slots_R: list[int]
    first_positions_R: list[int]
    num_rows_R: list[int]
    num_samples_R: list[int]
    token_ids_T: list[int]  # for the first stage
    updates_S: list[SequenceUpdates]

    def for_stage(self, stage_index: int) -> MicroBatch:
        """The micro-batch as that stage's engine takes it."""
        return MicroBatch(
            id=self.micro_batch_id,
            slots_R=np.array(self.slots_R, np.int32),
            first_positions_R=np.array(self.first_positions_R, np.int32),
            num_rows_R=np.array(self.num_rows_R, np.int32),
            num_samples_R=np.array(self.num_samples_R, np.int32),
            token_ids_T=np.array(self.token_ids_T if stage_index == 0 else [], np.int32),
            updates=self.updates_S[stage_index],
        )


@dataclass(kw_only=True, slots=True)
class FlushUpdates:
    """Send these updates by themselves: there is nothing to compute."""

    updates_S: list[SequenceUpdates]


@dataclass(kw_only=True, slots=True)
class EmitTokens:
    """Give a request its new tokens. `finish_reason` and `usage` come with the last ones."""

    request_id: int
    token_ids: list[int]
    logprobs: list[PositionLogprobs]  # as long as token_ids where asked for, else empty
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(kw_only=True, slots=True)
class Refuse:
    """End a request that cannot be served, now or ever, with this error."""

    request_id: int
    error: PenstockError
    usage: Usage | None = None  # None: it never began


@dataclass(kw_only=True, slots=True)
class DropPipeline:
    """The pipeline makes no progress: close its streams and open it again."""

    reason: str


Action = RunMicroBatch | FlushUpdates | EmitTokens | Refuse | DropPipeline
