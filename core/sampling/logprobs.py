"""Log probabilities of a generated token and of its alternatives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PositionLogprobs:
    """Log probabilities at one position: the chosen token's and the likeliest ones'.

    Natural logarithms at temperature 1, before penalties and filters; likeliest first.
    """

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
