"""What the scheduler wants done, in the order given.

Letters: R runs, T rows (tokens) in all, P replicas of a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from core.errors import PenstockError
from core.pipeline.batch import MicroBatch, PositionLogprobs, SequenceUpdates
from core.pipeline.cut import Cut


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
    """Compute a micro-batch on the replicas of `path`, first to last.

    The path is one replica of each of several neighbouring stages, from `first_stage` on: of all
    of them, or, to restore what a replica lost, of those that take part. Activations go from one
    to the next; the last one answers. Where `replays`, the first one computes nothing and sends
    from its log. The runs are the same for all; `updates_P` has each replica's own (its block ids;
    a last stage's starts carry sampling). Plain lists, because they go straight into messages.
    `is_alone`: nothing is in flight that another replica would compute meanwhile.
    """

    micro_batch_id: int
    path: tuple[int, ...]  # replica ids
    first_stage: int
    replays: bool
    slots_R: list[int]
    first_positions_R: list[int]
    num_rows_R: list[int]
    num_samples_R: list[int]
    token_ids_T: list[int]  # for the model's first stage; empty where it does not take part
    updates_P: list[SequenceUpdates]
    is_alone: bool = False

    def for_replica(self, number: int) -> MicroBatch:
        """The micro-batch as the engine of the path's replica `number`, from 0, takes it."""
        return MicroBatch(
            id=self.micro_batch_id,
            slots_R=np.array(self.slots_R, np.int32),
            first_positions_R=np.array(self.first_positions_R, np.int32),
            num_rows_R=np.array(self.num_rows_R, np.int32),
            num_samples_R=np.array(self.num_samples_R, np.int32),
            token_ids_T=np.array(
                self.token_ids_T if self.first_stage + number == 0 else [], np.int32
            ),
            updates=self.updates_P[number],
            replays=self.replays and number == 0,
            is_alone=self.is_alone,
        )


@dataclass(kw_only=True, slots=True)
class FlushUpdates:
    """Send these updates to a replica by themselves: there is nothing to compute."""

    replica_id: int
    updates: SequenceUpdates


@dataclass(kw_only=True, slots=True)
class AbandonMicroBatches:
    """Have a replica drop these: their activations will not come. Goes out before all orders that
    follow."""

    replica_id: int
    micro_batch_ids: list[int]


@dataclass(kw_only=True, slots=True)
class EmitTokens:
    """Give a request its new tokens. `finish_reason` and `usage` come with the last ones."""

    request_id: int
    token_ids: list[int]
    logprobs: list[PositionLogprobs]  # as long as token_ids where asked for, else empty
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    began_on: Cut | None = None  # with the first ones: what computes them


@dataclass(kw_only=True, slots=True)
class Refuse:
    """End a request that cannot be served, now or ever, with this error."""

    request_id: int
    error: PenstockError
    usage: Usage | None = None  # None: it never began


@dataclass(kw_only=True, slots=True)
class DropReplica:
    """A replica makes no progress: end its streams and open it again. The scheduler has given it up
    already."""

    replica_id: int
    reason: str


Action = RunMicroBatch | FlushUpdates | AbandonMicroBatches | EmitTokens | Refuse | DropReplica
