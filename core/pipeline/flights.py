"""Micro-batches on their way, and which of them a stage's report speaks of."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import NamedTuple

from core.pipeline.sequences import Sequence


class Sampler(NamedTuple):
    """A sequence that gets tokens of a micro-batch, and the guesses that its run verifies."""

    sequence: Sequence
    draft: list[int]

    @property
    def num_samples(self) -> int:
        return 1 + len(self.draft)


@dataclass(slots=True, eq=False, kw_only=True)
class Flight:
    """A micro-batch that has been sent. A pair is one row looking at one position."""

    micro_batch_id: int
    launched_s: float
    samplers: list[Sampler]  # in the order of their runs
    rows: int
    pairs: int
    has_decodes: bool
    found_empty: bool  # none was in flight when it was launched
    overlapped: bool  # others were in flight at some time of its life


class Observations(NamedTuple):
    """Measured micro-batches of one stage, all overlapped or all alone."""

    rows: list[float]
    pairs: list[float]
    seconds: list[float]


class FlightHistory:
    """Remembers what was sent, so that reports, which carry rows and times only, gain pairs.

    Every stage computes all micro-batches in the order sent; a stage's next report continues
    where its last one ended.
    """

    def __init__(self, num_stages: int, *, limit: int = 4096) -> None:
        self._flights: deque[Flight] = deque()
        self._first = 0  # number of the oldest flight still remembered
        self._next_S = [0] * num_stages
        self._limit = limit

    def add(self, flight: Flight) -> None:
        self._flights.append(flight)
        if len(self._flights) > self._limit:
            self._flights.popleft()
            self._first += 1

    def match(
        self, stage_index: int, batch_rows: List[int], batch_seconds: List[float]
    ) -> tuple[Observations, Observations]:
        """Attributes a report: (alone, overlapped). What does not fit what was sent is left out."""
        alone, overlapped = Observations([], [], []), Observations([], [], [])
        number = max(self._next_S[stage_index], self._first)
        for rows, seconds in zip(batch_rows, batch_seconds, strict=True):
            index = number - self._first
            if index >= len(self._flights):
                break
            flight = self._flights[index]
            number += 1
            if flight.rows != rows:
                continue
            target = overlapped if flight.overlapped else alone
            target.rows.append(rows)
            target.pairs.append(flight.pairs)
            target.seconds.append(seconds)
        self._next_S[stage_index] = number
        self._trim()
        return alone, overlapped

    def _trim(self) -> None:
        oldest = min(self._next_S)
        while self._first < oldest and self._flights:
            self._flights.popleft()
            self._first += 1
