"""Which token ends a completion."""

from __future__ import annotations

from collections.abc import Collection

from core.sampling.parameters import SamplingParameters


def finish_reason(
    token_id: int,
    num_generated: int,
    parameters: SamplingParameters,
    eos_token_ids: Collection[int],
) -> str | None:
    """ "stop" or "length" when this token, the `num_generated`-th one, is the last; else None."""
    if token_id in parameters.stop_token_ids:
        return "stop"
    if token_id in eos_token_ids and not parameters.ignore_eos:
        return "stop"
    return "length" if num_generated >= parameters.max_tokens else None
