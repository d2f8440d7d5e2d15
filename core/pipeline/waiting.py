"""The queue of requests that hold neither slot nor blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from core.pipeline.sequences import Sequence


class WaitingQueue:
    """Oldest first. Sequences that were preempted return to their place by age."""

    def __init__(self) -> None:
        self._sequences: deque[Sequence] = deque()
        self.num_rows = 0  # tokens of all of them

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Adds the youngest."""
        self._sequences.append(sequence)
        self.num_rows += len(sequence.token_ids)

    def put_back(self, sequence: Sequence) -> None:
        """Adds one that ran before, ahead of all that are younger."""
        index = 0
        for other in self._sequences:
            if other.order > sequence.order:
                break
            index += 1
        self._sequences.insert(index, sequence)
        self.num_rows += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """Takes one out, from the head at no cost."""
        if self._sequences[0] is sequence:
            self._sequences.popleft()
        else:
            self._sequences.remove(sequence)
        self.num_rows -= len(sequence.token_ids)
