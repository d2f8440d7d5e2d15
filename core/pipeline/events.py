"""What happens to a pipeline: the inputs of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.pipeline.batch import PositionLogprobs
from core.sampling.parameters import SamplingParameters


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """What the scheduler must know of one stage."""

    num_kv_blocks: int
    max_rows: int  # most rows of a micro-batch


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFacts:
    """What the scheduler must know of an opened pipeline; first stage first."""

    stages: tuple[StageFacts, ...]
    num_slots: int  # most sequences at a time; slots are below this
    context_length: int  # most positions of a sequence
    kv_block_size: int = 16  # positions in a KV block
    eos_token_ids: tuple[int, ...] = ()
    # Names weights and arithmetic: what was computed with others is of no use.
    weights: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineReady:
    """All stages are open, empty and fit each other."""

    facts: PipelineFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineLost:
    """A stage or its stream is gone; nothing in flight will return."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestArrived:
    """A request. `token_ids` is the prompt; the scheduler keeps it and does not change it."""

    request_id: int  # unique for the life of the scheduler
    token_ids: Sequence[int]
    sampling: SamplingParameters
    deadline_s: float | None = None  # on the clock of `now_s`
    traceparent: str = ""
    # Only requests of equal salt share what was computed for their prompts: a tenant's secret.
    cache_salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestCancelled:
    """Nobody waits for this request any more. Unknown ids are ignored."""

    request_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensSampled:
    """A micro-batch has left the last stage: one token for each sampled row, in order."""

    micro_batch_id: int
    token_ids: Sequence[int]
    # As long as token_ids where any run asked for log probabilities, else empty.
    logprobs: Sequence[PositionLogprobs | None] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReported:
    """How long a stage took for its latest micro-batches, in the order it computed them."""

    stage_index: int
    batch_rows: Sequence[int]
    batch_seconds: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time has passed: look at deadlines. Several a second are enough."""


Event = (
    PipelineReady
    | PipelineLost
    | RequestArrived
    | RequestCancelled
    | TokensSampled
    | StageReported
    | Tick
)
