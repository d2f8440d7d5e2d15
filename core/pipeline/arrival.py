"""Whether a request can be served, and when to try again where it cannot be queued."""

from __future__ import annotations

from core.errors import Exhausted, InvalidInput, PenstockError
from core.pipeline.events import PipelineFacts, RequestArrived
from core.pipeline.sequences import Sequence


def misfit(
    event: RequestArrived, facts: PipelineFacts, *, num_kv_blocks: int
) -> PenstockError | None:
    """Why a request can never be served by this pipeline; None when it can."""
    num_prompt = len(event.token_ids) - event.num_output_tokens
    max_tokens = event.sampling.max_tokens
    if event.num_output_tokens < 0:
        return InvalidInput("num_output_tokens", event.num_output_tokens, "0 or more")
    if event.began_on is not None and event.began_on.parts[-1].end_layer != facts.num_layers:
        return InvalidInput("began_on", event.began_on.split, f"a cut of {facts.num_layers} layers")
    if num_prompt <= 0:
        return InvalidInput("token_ids", event.token_ids, "at least one token of the prompt")
    if max_tokens < 1:
        return InvalidInput("sampling.max_tokens", max_tokens, "at least 1")
    if num_prompt + max_tokens > facts.context_length:
        allowed = f"prompt ({num_prompt}) and completion within {facts.context_length} tokens"
        return InvalidInput("sampling.max_tokens", max_tokens, allowed)
    wanted = most_blocks(num_prompt + max_tokens, facts)
    if wanted > num_kv_blocks:
        return Exhausted(f"the request may need {wanted} KV blocks; a stage has {num_kv_blocks}")
    return None


def new_sequence(
    event: RequestArrived, facts: PipelineFacts, *, order: int, now_s: float
) -> Sequence:
    """The sequence of a request that fits."""
    num_prompt = len(event.token_ids) - event.num_output_tokens
    return Sequence(
        request_id=event.request_id,
        order=order,
        token_ids=list(event.token_ids),
        num_prompt_tokens=num_prompt,
        most_blocks=most_blocks(num_prompt + event.sampling.max_tokens, facts),
        sampling=event.sampling,
        arrived_s=now_s,
        traceparent=event.traceparent,
        cache_salt=event.cache_salt,
        tenant=event.tenant,
        priority=event.priority,
    )


def most_blocks(num_tokens: int, facts: PipelineFacts) -> int:
    """KV blocks of a whole sequence. Its last token is never computed, so it needs no room."""
    return -(-(num_tokens - 1) // facts.kv_block_size)


class Pace:
    """How fast requests finish, for telling those that are refused when to return."""

    def __init__(self) -> None:
        self._mean_interval_s = 1.0
        self._last_s: float | None = None

    def note_finish(self, now_s: float) -> None:
        if self._last_s is not None:
            self._mean_interval_s += 0.05 * (now_s - self._last_s - self._mean_interval_s)
        self._last_s = now_s

    def expected_wait_s(self, num_waiting: int) -> float:
        """Until a tenth of the queue is gone; from half a second to half a minute."""
        return min(max(self._mean_interval_s * num_waiting / 10, 0.5), 30.0)
