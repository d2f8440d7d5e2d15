"""Arrivals and lengths of real chat requests: the Azure LLM inference trace of 2023.

Patel et al., "Splitwise", ISCA 2024; see tests/data/README.md for source and licence.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

TRACE = Path(__file__).parents[1] / "data" / "azure_llm_2023_conv.csv.gz"


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRequest:
    """A request of the trace; `at_s` counts from the first one."""

    at_s: float
    num_prompt_tokens: int
    num_new_tokens: int


def read_trace(path: Path = TRACE, *, limit: int | None = None) -> list[TracedRequest]:
    """The first `limit` requests, in order of arrival."""
    requests: list[TracedRequest] = []
    with gzip.open(path, "rt", newline="") as lines:
        first: datetime | None = None
        for row in csv.DictReader(lines):
            if len(requests) == limit:
                break
            # Seven digits of a second, one more than datetime takes.
            arrival = datetime.fromisoformat(row["TIMESTAMP"][:26])
            first = first or arrival
            requests.append(
                TracedRequest(
                    at_s=(arrival - first).total_seconds(),
                    num_prompt_tokens=int(row["ContextTokens"]),
                    num_new_tokens=max(1, int(row["GeneratedTokens"])),
                )
            )
    return requests


def clip(
    requests: Sequence[TracedRequest], *, context_length: int
) -> tuple[list[TracedRequest], float]:
    """Shortens prompts until they fit the context with their answers.

    Also returns the share of requests that were shortened.
    """
    clipped = [_clip(request, context_length) for request in requests]
    changed = sum(before != after for before, after in zip(requests, clipped, strict=True))
    return clipped, changed / len(requests)


def scale(requests: Sequence[TracedRequest], *, requests_per_s: float) -> list[TracedRequest]:
    """Keeps the pattern of arrivals, faster or slower, at a mean rate."""
    mean_rate = (len(requests) - 1) / (requests[-1].at_s - requests[0].at_s)
    factor = mean_rate / requests_per_s
    return [
        TracedRequest(
            at_s=(request.at_s - requests[0].at_s) * factor,
            num_prompt_tokens=request.num_prompt_tokens,
            num_new_tokens=request.num_new_tokens,
        )
        for request in requests
    ]


def _clip(request: TracedRequest, context_length: int) -> TracedRequest:
    new = min(request.num_new_tokens, context_length // 2)
    prompt = max(1, min(request.num_prompt_tokens, context_length - new))
    return TracedRequest(at_s=request.at_s, num_prompt_tokens=prompt, num_new_tokens=new)
