"""Micro-batches on their way, and which of them a replica's report speaks of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from core.pipeline.sequences import Seat, Sequence

if TYPE_CHECKING:
    from core.pipeline.path import Path
    from core.pipeline.replica import Replica


class Sampler(NamedTuple):
    """A sequence that gets tokens of a micro-batch, and the guesses that its run verifies."""

    sequence: Sequence
    draft: list[int]

    @property
    def num_samples(self) -> int:
        return 1 + len(self.draft)


class Chunk(NamedTuple):
    """Prompt rows of one sequence in a micro-batch."""

    sequence: Sequence
    rows: int


class Promise(NamedTuple):
    """Blocks that others find from the launch of the micro-batch on that fills them."""

    seats: list[Seat]  # of the sequence that fills them, one for each replica of the path
    block_ids_S: list[list[int]]  # of each seat


class Restored(NamedTuple):
    """Rows that a micro-batch computes again for replicas new to a sequence."""

    sequence: Sequence
    seats: list[Seat]
    end: int  # position behind the last of them


@dataclass(slots=True, eq=False, kw_only=True)
class Flight:
    """A micro-batch that has been sent. A pair is one row looking at one position."""

    micro_batch_id: int
    path: Path
    replicas: tuple[Replica, ...]  # those that take part; all of the path, unless it restores
    launched_s: float
    rows: int
    pairs: int
    overlapped: bool  # others of the path were in flight at some time of its life
    found_empty: bool = False  # none was, of any path through its replicas, when it was launched
    replays: bool = False  # the first replica computes nothing
    # In the order of their runs: decodes, then the chunks with which prompts end.
    samplers: list[Sampler] = field(default_factory=list)
    num_samples: int = 0  # tokens that it returns
    num_decodes: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    first_positions_R: list[int] = field(default_factory=list)  # of decodes, then chunks
    promises: list[Promise] = field(default_factory=list)
    restored: list[Restored] = field(default_factory=list)

    @property
    def computing(self) -> tuple[Replica, ...]:
        """The replicas that compute it."""
        return self.replicas[1:] if self.replays else self.replicas

    @property
    def beginnings(self) -> Iterator[tuple[Sequence, int]]:
        """Sequences that it computes new rows of, and the position of the first."""
        decoding = (sampler.sequence for sampler in self.samplers[: self.num_decodes])
        prompts = (chunk.sequence for chunk in self.chunks)
        return zip(chain(decoding, prompts), self.first_positions_R, strict=True)


class Traffic:
    """Everything in flight, on all paths and on each replica."""

    def __init__(self) -> None:
        self.flights: dict[int, Flight] = {}  # by id, the oldest first
        self.num_restored_rows = 0  # sent to be computed again

    def __len__(self) -> int:
        return len(self.flights)

    def add(self, flight: Flight) -> None:
        """Takes in a micro-batch that is sent now."""
        self.flights[flight.micro_batch_id] = flight
        if flight.restored:
            self.num_restored_rows += flight.rows
        for replica in flight.replicas:
            replica.flights[flight.micro_batch_id] = flight
        for replica in flight.computing:
            replica.history.add(flight)

    def land(self, flight: Flight) -> None:
        """Lets one go that has returned: all its replicas have performed it."""
        flight_id = flight.micro_batch_id
        self.drop(flight)
        for replica in flight.replicas:
            if replica.performed_id < flight_id:
                replica.performed_id = flight_id

    def drop(self, flight: Flight) -> None:
        """Lets one go that will not return."""
        del self.flights[flight.micro_batch_id]
        for replica in flight.replicas:
            del replica.flights[flight.micro_batch_id]

    def leaves_others_idle(self, flight: Flight) -> bool:
        """Whether no other replica is likely to compute while one computes this.

        So it is for the only one in flight; and for one that restores a single replica as long as
        all others have to pass that replica too, where they wait behind it.
        """
        if len(self.flights) == 1:
            return True
        if not flight.restored or len(flight.computing) > 1:
            return False
        (bottleneck,) = flight.computing
        return all(bottleneck in other.computing for other in self.flights.values())

    def carries(self, sequence: Sequence) -> bool:
        """Whether something of a sequence is in flight."""
        return sequence.num_restores > 0 or sequence.last_micro_batch_id in self.flights


class Observations(NamedTuple):
    """Measured micro-batches of one replica, all overlapped or all alone."""

    rows: list[float]
    pairs: list[float]
    seconds: list[float]


class FlightHistory:
    """Remembers what was sent to a replica, so that reports, which carry rows and times only, gain
    pairs.

    A replica computes all micro-batches in the order sent; its next report continues where the
    last one ended. Those that it abandoned it does not report: they are passed over.
    """

    def __init__(self, *, limit: int = 4096) -> None:
        self._flights: deque[Flight] = deque(maxlen=limit)

    def add(self, flight: Flight) -> None:
        self._flights.append(flight)

    def match(
        self, batch_rows: List[int], batch_seconds: List[float], *, performed_id: int
    ) -> tuple[Observations, Observations]:
        """Attributes a report: (alone, overlapped). What does not fit what was sent is left out.

        `performed_id`: the latest that the report can speak of; 0 where that is not known.
        """
        alone, overlapped = Observations([], [], []), Observations([], [], [])
        flights = self._flights
        for rows, seconds in zip(batch_rows, batch_seconds, strict=True):
            while flights and flights[0].rows != rows and flights[0].micro_batch_id < performed_id:
                flights.popleft()
            if not flights:
                break
            flight = flights.popleft()
            if flight.rows != rows:
                continue
            target = overlapped if flight.overlapped else alone
            target.rows.append(rows)
            target.pairs.append(flight.pairs)
            target.seconds.append(seconds)
        while flights and flights[0].micro_batch_id <= performed_id:
            flights.popleft()
        return alone, overlapped
