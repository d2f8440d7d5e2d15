"""The queue of requests that hold neither slot nor blocks: who is admitted next.

All of a higher priority come first. Among equals, tenants share the admissions by weight: each
request begins, in a virtual time that counts tokens, when its tenant's last one ends, or now where
its tenant has been away; the earliest begin is next (start-time fair queueing: Goyal, Vin and
Cheng, SIGCOMM 1996). Of one tenant, and so where there is but one, the oldest is next. (Short ones
may pass a long one for all that: see `admission`.)

Its places are shared by weight, too: when it is full, a newcomer takes that of a tenant with more
than its share.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
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
        self._num_of: Counter[str] = Counter()  # by tenant
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
        self._ends[tenant] = sequence.turn + num_tokens / self._weight(tenant)
        if len(self._ends) > _MOST_TENANTS:
            self._ends = {name: end for name, end in self._ends.items() if end > self._now}
        self.put_back(sequence)

    def who_gives_way(self, newcomer: str) -> Sequence | None:
        """Who is refused so that a tenant's newcomer finds a place: the last of the tenant that has
        most in the queue for its weight, of those that have not begun. None: the newcomer itself,
        whose tenant would have as many."""
        own = (self._num_of[newcomer] + 1) / self._weight(newcomer)
        loads = {tenant: count / self._weight(tenant) for tenant, count in self._num_of.items()}
        for tenant in sorted(loads, key=lambda tenant: -loads[tenant]):
            if loads[tenant] <= own:
                return None
            for sequence in reversed(self._sequences):
                if sequence.tenant == tenant and not sequence.has_begun:
                    return sequence
        return None

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def put_back(self, sequence: Sequence) -> None:
        """Adds one that was here before, at its old place."""
        insort(self._sequences, sequence, key=_place)
        self._num_of[sequence.tenant] += 1
        self.num_rows += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """Takes one out."""
        index = bisect_left(self._sequences, _place(sequence), key=_place)
        assert self._sequences[index] is sequence, "it is not in the queue"
        del self._sequences[index]
        self._num_of[sequence.tenant] -= 1
        if not self._num_of[sequence.tenant]:
            del self._num_of[sequence.tenant]
        self._now = max(self._now, sequence.turn)
        self.num_rows -= len(sequence.token_ids)


def _place(sequence: Sequence) -> tuple[int, float, int]:
    return -sequence.priority, sequence.turn, sequence.order
