"""The queue of requests that hold neither slot nor blocks: who is admitted next.

All of a higher priority come first. Among equals, tenants share the admissions by weight: each
request begins, in a virtual time that counts tokens, when its tenant's last one ends, or now where
its tenant has been away; the earliest begin is next (start-time fair queueing: Goyal, Vin and
Cheng, SIGCOMM 1996). Of one tenant, and so where there is but one, the oldest is next.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from core.pipeline.sequences import Sequence

# Tenants that are remembered though their requests are all in the past.
_MOST_TENANTS = 4096


class WaitingQueue:
    """The next one first. Sequences that were preempted return to the place that they had."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """`weights` of tenants, above 0; 1 for all others."""
        self._weights = weights or {}
        self._sequences: list[Sequence] = []  # by `_place`
        self._now = 0.0  # virtual: where the latest that was taken out began
        self._ends: dict[str, float] = {}  # of each tenant's latest request, in virtual time
        self.num_rows = 0  # tokens of all of them

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Adds a newcomer. It counts with all tokens that it asks for, whatever becomes of it."""
        tenant = sequence.tenant
        sequence.turn = max(self._now, self._ends.get(tenant, 0.0))
        num_tokens = sequence.num_prompt_tokens + sequence.sampling.max_tokens
        self._ends[tenant] = sequence.turn + num_tokens / self._weights.get(tenant, 1.0)
        if len(self._ends) > _MOST_TENANTS:
            self._ends = {name: end for name, end in self._ends.items() if end > self._now}
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Adds one that was here before, at its old place."""
        insort(self._sequences, sequence, key=_place)
        self.num_rows += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """Takes one out."""
        index = bisect_left(self._sequences, _place(sequence), key=_place)
        assert self._sequences[index] is sequence, "it is not in the queue"
        del self._sequences[index]
        self._now = max(self._now, sequence.turn)
        self.num_rows -= len(sequence.token_ids)


def _place(sequence: Sequence) -> tuple[int, float, int]:
    return -sequence.priority, sequence.turn, sequence.order
