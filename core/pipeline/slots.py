"""The slots of a pipeline: numbers of sequences, unique over all replicas.

A slot rests until nothing in flight names it, so that in a late message it means one sequence only.
"""

from __future__ import annotations

from collections import deque

from core.pipeline.flights import Traffic
from core.pipeline.sequences import Sequence


class SlotPool:
    """The slots 0 .. num_slots - 1."""

    def __init__(self, num_slots: int, traffic: Traffic) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._resting: deque[tuple[int, Sequence]] = deque()
        self._traffic = traffic

    def take(self) -> int | None:
        """A free slot, if there is one."""
        if not self._free:
            self._wake()
        return self._free.pop() if self._free else None

    def give_back(self, sequence: Sequence) -> None:
        """Takes the slot of a sequence that ends; what is in flight of it may still land."""
        if self._traffic.carries(sequence):
            self._resting.append((sequence.slot, sequence))
        else:
            self._free.append(sequence.slot)
        sequence.slot = -1

    def _wake(self) -> None:
        for _ in range(len(self._resting)):
            slot, sequence = self._resting.popleft()
            if self._traffic.carries(sequence):
                self._resting.append((slot, sequence))
            else:
                self._free.append(slot)
