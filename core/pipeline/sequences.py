"""A request as the scheduler sees it: tokens, and where they are on their way."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from core.pipeline.actions import Usage
from core.pipeline.token_index import TokenIndex
from core.sampling.parameters import SamplingParameters


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = 1  # in the queue: no slot, no blocks
    RUNNING = 2  # has a slot and blocks
    ENDED = 3


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Prompt and output of one request.

    Positions below `num_scheduled` are in the KV cache of every stage of the path, or on
    their way there; `token_ids[num_scheduled:]` is what has yet to be computed.
    """

    request_id: int
    order: int  # number of arrival: a younger sequence has a greater one
    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    sampling: SamplingParameters
    arrived_s: float
    traceparent: str = ""
    cache_salt: str = ""
    state: State = State.WAITING
    slot: int = -1
    tables_S: list[list[int]] = field(default_factory=list)  # block ids, stage by stage
    capacity: int = 0  # positions that its blocks can hold
    block_keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as known
    num_published: int = 0  # of its blocks, since its latest start
    num_found: int = 0  # positions whose keys and values it found at its latest start
    num_cached: int = 0  # of those at its first start, all the prompt's
    num_scheduled: int = 0
    last_micro_batch_id: int = -1  # the latest one that carries it
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
