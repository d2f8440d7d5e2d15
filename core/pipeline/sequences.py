"""A request as the scheduler sees it: tokens, and where they are on their way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from core.pipeline.actions import Usage
from core.pipeline.cut import Cut
from core.pipeline.token_index import TokenIndex
from core.sampling.parameters import SamplingParameters

if TYPE_CHECKING:
    from core.pipeline.path import Path
    from core.pipeline.replica import Replica


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = 1  # in the queue: no slot, no blocks
    RUNNING = 2  # has a slot, and a seat on every replica of its path
    STRANDED = 3  # its path is lost: has a slot, and seats on the replicas that are left
    ENDED = 4


@dataclass(slots=True, eq=False)
class Seat:
    """What a sequence has on one replica."""

    replica: Replica
    block_ids: list[int]
    num_found: int  # positions that had been computed for others when it came, whole blocks
    # Of the positions below `restore_end`, computed before it came here, those that are here by
    # now; later ones are computed here as on all replicas.
    num_restored: int = 0
    restore_end: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all that has landed is here too."""
        return self.num_restored >= self.restore_end


class Piece(NamedTuple):
    """Positions that stages `first_stage` up to, not including, `end_stage` must compute again."""

    first_stage: int
    end_stage: int
    first: int
    end: int


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Prompt and output of one request.

    Positions below `num_scheduled` are in the KV cache of every replica of the path, or on
    their way there; `token_ids[num_scheduled:]` is what has yet to be computed.
    """

    request_id: int
    order: int  # number of arrival: a younger sequence has a greater one
    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    most_blocks: int = 1  # KV blocks that it may come to need
    sampling: SamplingParameters
    arrived_s: float
    traceparent: str = ""
    cache_salt: str = ""
    tenant: str = ""
    priority: int = 0
    turn: float = 0.0  # when it begins in the queue's virtual time
    state: State = State.WAITING
    cut: Cut | None = None  # of its latest path, once it has begun, or the one that it probes
    probes: bool = False  # it stays on its cut, whichever is chosen
    path: Path | None = None  # while it runs
    destination: Path | None = None  # while it is stranded: the path that will take it in
    slot: int = -1
    seats: list[Seat] = field(default_factory=list)  # in order of stages
    latest_seats: list[Seat] = field(default_factory=list)  # where its latest rows were computed
    capacity: int = 0  # positions that its blocks can hold
    block_keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as known
    root_key: bytes = b""  # of `block_keys`
    num_published: int = 0  # of its blocks, since its latest start
    num_cached: int = 0  # positions that it found at its first start, all the prompt's
    num_scheduled: int = 0
    num_passed: int = 0  # tokens of later prompts that were computed before the rest of its own
    pieces: deque[Piece] = field(default_factory=deque)  # to be restored before it goes on
    num_restores: int = 0  # micro-batches in flight that restore some of it
    last_micro_batch_id: int = -1  # the latest one that computes something new of it
    void_id: int = -1  # micro-batches up to this one bring it nothing
    unfit_since_s: float | None = None  # since when all paths there are have been too small for it
    scheduled_s: float | None = None  # when its first chunk was scheduled
    first_token_s: float | None = None
    last_token_s: float | None = None
    index: TokenIndex | None = None  # of `token_ids`, once guesses are wanted

    @property
    def num_unscheduled(self) -> int:
        return len(self.token_ids) - self.num_scheduled

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def has_begun(self) -> bool:
        """Whether anything has been computed for it, here or by another coordinator."""
        return self.scheduled_s is not None or self.num_generated > 0

    def usage(self, now_s: float) -> Usage:
        """What it has cost until now."""
        scheduled_s = now_s if self.scheduled_s is None else self.scheduled_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        last_token_s = first_token_s if self.last_token_s is None else self.last_token_s
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_generated,
            cached_tokens=self.num_cached,
            queue_s=scheduled_s - self.arrived_s,
            prefill_s=first_token_s - scheduled_s,
            decode_s=last_token_s - first_token_s,
        )
