"""When a completion ends, as far as token ids tell; stop strings are found in its text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from core.sampling.parameters import SamplingParameters


def finish_reason(
    token_id: int,
    *,
    num_generated: int,
    parameters: SamplingParameters,
    eos_token_ids: Collection[int],
) -> Literal["stop", "length"] | None:
    """Why the completion ends with `token_id`, or None while it goes on.

    `num_generated` counts this token too. A stop token wins over the length; `ignore_eos`
    leaves the request's own stop tokens in force.
    """
    if token_id in parameters.stop_token_ids:
        return "stop"
    if not parameters.ignore_eos and token_id in eos_token_ids:
        return "stop"
    if num_generated >= parameters.max_tokens:
        return "length"
    return None
