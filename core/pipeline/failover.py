"""What is done when replicas and links come and go, so that no sequence is lost.

A loss drops the micro-batches in flight through it. Every replica that lives abandons those of
them that it has not performed, which nobody can know from here: what a sequence had in flight is
therefore taken back on all of them, to where it had landed, and sent again. Sequences of a path
that is lost are stranded until they get another one; `Mirror.move` keeps what they have.

Blocks are found from the launch on of the micro-batch that fills them. Where it is abandoned they
hold nothing: they are forgotten, with all that was promised by those who had found them, and
those who did begin again from the queue. What had landed cannot be among it: a replica that has
performed a micro-batch has performed all those before it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence as List
from itertools import pairwise
from math import inf

from core.pipeline.actions import AbandonMicroBatches, Action
from core.pipeline.admission import Admission
from core.pipeline.cut import Cut
from core.pipeline.flights import Flight, Promise
from core.pipeline.path import Path, Shared
from core.pipeline.replica import Replica
from core.pipeline.sequences import Seat, Sequence, State
from core.pipeline.topology import Topology, Way

Blocks = dict[Replica, set[int]]


class Failover:
    """The paths that there are, and the sequences between them."""

    def __init__(self, topology: Topology, shared: Shared) -> None:
        self.paths: dict[Way, Path] = {}
        self.is_due = False  # something has changed: `settle` is wanted
        self._topology = topology
        self._shared = shared
        self._admission = shared.admission
        self._latest: Path | None = None

    @property
    def has_closing(self) -> bool:
        """Whether there are paths to evacuate."""
        return any(path.is_closing for path in self.paths.values())

    # --- what is lost

    def lose_replica(self, replica: Replica) -> list[Action]:
        """A replica is gone with all it held."""
        self._topology.remove(replica)
        lost = list(replica.flights.values())
        actions = self._lose(lost, [p for p in self.paths.values() if replica in p.replicas])
        for sequence in replica.residents:
            self._shared.mirror.lose(sequence, replica)
        replica.residents.clear()
        return actions

    def lose_link(self, upstream: Replica, downstream: Replica) -> list[Action]:
        """What is in flight over a link will not arrive."""
        self._topology.unlink(upstream.id, downstream.id)
        lost = [f for f in upstream.flights.values() if _passes(f.replicas, upstream, downstream)]
        paths = [p for way, p in self.paths.items() if _passes(way, upstream, downstream)]
        return self._lose(lost, paths)

    def _lose(self, lost: List[Flight], paths: List[Path]) -> list[Action]:
        """Drops the flights and strands the sequences of the paths."""
        self.is_due = True
        actions = _abandon(lost)
        garbage = _promised(lost)
        for flight in reversed(lost):
            flight.path.drop(flight)
            for sequence, first in flight.beginnings:
                if sequence.state is State.RUNNING:
                    sequence.num_scheduled = first
        for path in paths:
            del self.paths[path.replicas]
            for sequence in list(path.running):
                path.leave(sequence)
                self._strand(sequence)
        self._take_back(garbage)
        return actions

    def _strand(self, sequence: Sequence) -> None:
        sequence.state = State.STRANDED
        self._admission.stranded.add(sequence)

    def _take_back(self, garbage: Blocks) -> None:
        """Forgets promised blocks that will not be filled, and all that rests on them."""
        self._spread(garbage)
        for replica, block_ids in garbage.items():
            for block in block_ids:
                replica.allocator.unpublish(block)
        found = {
            sequence
            for replica in garbage
            for sequence in replica.residents
            if any(_stands_on(seat, garbage) for seat in sequence.seats)
        }
        for sequence in found:
            sequence.void_id = sequence.last_micro_batch_id
            self._admission.preempt(sequence, publishes=False)
        self._void_preempted(garbage)

    def _void_preempted(self, garbage: Blocks) -> None:
        """Those in the queue have no seats to lose, yet a token on its way, from such blocks."""
        for flight in self._shared.traffic.flights.values():
            for sequence, _ in flight.samplers:
                if sequence.state is State.WAITING and any(
                    _stands_on(seat, garbage) for seat in sequence.latest_seats
                ):
                    sequence.void_id = flight.micro_batch_id

    def _spread(self, garbage: Blocks) -> None:
        """Adds what is in flight on other paths and was computed from such blocks."""
        promises = [p for f in self._shared.traffic.flights.values() for p in f.promises]
        has_grown = bool(garbage)
        while has_grown:
            has_grown = False
            for promise in promises.copy():
                if any(_stands_on(seat, garbage) for seat in promise.seats):
                    _add(garbage, promise)
                    promises.remove(promise)
                    has_grown = True

    # --- who goes where

    def settle(self, now_s: float) -> None:
        """Finds the lanes anew and tells sequences without a path where to go, the oldest first."""
        self.is_due = False
        self._find_lanes(now_s)
        for path in self.paths.values():
            path.forget_newcomers()
        homes = _Homes(self._topology, self._admission)
        for sequence in sorted(self._admission.stranded, key=lambda sequence: sequence.order):
            sequence.destination = None
            self._send(sequence, homes.best_way(sequence), now_s)

    def evacuate(self, now_s: float) -> None:
        """Lets sequences leave closing paths, each as soon as nothing of it is in flight."""
        leaving = [
            sequence
            for path in self.paths.values()
            if path.is_closing
            for sequence in path.running
            if not self._shared.traffic.carries(sequence)
        ]
        homes = _Homes(self._topology, self._admission)
        for sequence in sorted(leaving, key=lambda sequence: sequence.order):
            assert sequence.path is not None
            sequence.path.leave(sequence)
            self._strand(sequence)
            self._send(sequence, homes.best_way(sequence), now_s)

    def _send(self, sequence: Sequence, way: Way | None, now_s: float) -> None:
        """Lets a stranded sequence take a way. The queue has it where it has nothing to keep, or
        there is room only where it shall not stay; it stays stranded where no way stands."""
        if not sequence.seats:
            self._admission.preempt(sequence)
        elif way is not None:
            path = self._path(way, now_s)
            if path.is_closing:
                self._admission.preempt(sequence)
            else:
                path.expect(sequence)
        else:
            anywhere = _Homes(self._topology, self._admission)
            if anywhere.best_way(sequence, needs_room=False) is not None:
                self._admission.preempt(sequence)

    def _find_lanes(self, now_s: float) -> None:
        admission = self._admission
        chosen = admission.chosen = self._topology.chosen
        admission.lanes = self._lanes(chosen, now_s) if chosen is not None else []
        sequences = [*admission.queue, *admission.stranded]
        begun = {s.cut for s in sequences} | {path.cut for path in self.paths.values()}
        admission.lanes_of = {
            cut: self._lanes(cut, now_s, even_draining=True) for cut in begun if cut is not None
        }
        down_since_s = admission.down_since_s
        admission.down_since_s = {
            cut: down_since_s.get(cut, now_s)
            for cut, lanes in ((None, admission.lanes), *admission.lanes_of.items())
            if not lanes
        }
        for path in self.paths.values():
            path.is_closing = self._is_closing(path)

    def _is_closing(self, path: Path) -> bool:
        """Whether sequences shall leave it, and can."""
        lanes = self._admission.lanes_from(path.cut)
        return path.is_left and not all(lane.is_left for lane in lanes)

    def _lanes(self, cut: Cut, now_s: float, *, even_draining: bool = False) -> list[Path]:
        ways = self._topology.lanes(cut, even_draining=even_draining)
        if not ways:
            way = self._topology.best_way(cut.parts, kept=[], crowd=lambda replica: 0.0)
            ways = [way] if way is not None else []
        return [self._path(way, now_s) for way in ways]

    def _path(self, way: Way, now_s: float) -> Path:
        path = self.paths.get(way)
        if path is None:
            path = self.paths[way] = Path(way, self._shared, now_s=now_s)
            if self._latest is not None and len(self._latest.replicas) == len(way):
                path.policy.begin_like(self._latest.policy)
            path.is_closing = self._is_closing(path)
        self._latest = path
        return path


class _Homes:
    """Where stranded sequences may go, given where those before them go."""

    def __init__(self, topology: Topology, admission: Admission) -> None:
        self._topology = topology
        self._admission = admission
        self._num_expected: Counter[Replica] = Counter()  # sequences
        self._reserved: defaultdict[Replica, float] = defaultdict(float)  # blocks

    def best_way(self, sequence: Sequence, *, needs_room: bool = True) -> Way | None:
        """The best way that has room, now and for all that it may generate; None where none has."""
        parts = self._admission.parts_for(sequence)
        kept = [seat.replica for seat in sequence.seats]
        share = _share(sequence.seats[0]) if sequence.seats else 0.0

        def crowd(replica: Replica) -> float:
            allocator = replica.allocator
            fits = sequence.most_blocks <= allocator.num_blocks
            if needs_room and not (fits and share <= allocator.num_free - self._reserved[replica]):
                return inf
            cycle_s = replica.cycle_s(len(replica.residents) + self._num_expected[replica] + 1)
            return cycle_s / (cycle_s + 1.0)

        way = self._topology.best_way(parts, kept=kept, crowd=crowd)
        for replica in way or ():
            if replica not in kept:
                self._num_expected[replica] += 1
                self._reserved[replica] += share
        return way


def _share(seat: Seat) -> float:
    """Blocks of a sequence; of one that several share, its share."""
    return sum(1.0 / count for count in seat.replica.allocator.num_holders(seat.block_ids))


def _passes(way: Way, upstream: Replica, downstream: Replica) -> bool:
    return (upstream, downstream) in pairwise(way)


def _abandon(lost: List[Flight]) -> list[Action]:
    """Has every replica that lives drop what is lost."""
    ids_of: dict[Replica, list[int]] = {}
    for flight in lost:
        for replica in flight.replicas:
            if not replica.is_lost:
                ids_of.setdefault(replica, []).append(flight.micro_batch_id)
    return [
        AbandonMicroBatches(replica_id=replica.id, micro_batch_ids=ids)
        for replica, ids in ids_of.items()
    ]


def _promised(lost: List[Flight]) -> Blocks:
    """Blocks that the flights would have filled, and that are not known to be filled."""
    garbage: Blocks = {}
    for flight in lost:
        for promise in flight.promises:
            _add(garbage, promise, performed_by=flight.micro_batch_id)
    return garbage


def _add(garbage: Blocks, promise: Promise, *, performed_by: int | None = None) -> None:
    """Adds promised blocks; not those of replicas known to have performed the micro-batch."""
    for seat, block_ids in zip(promise.seats, promise.block_ids_S, strict=True):
        replica = seat.replica
        is_filled = performed_by is not None and replica.performed_id >= performed_by
        if block_ids and not replica.is_lost and not is_filled:
            garbage.setdefault(replica, set()).update(block_ids)


def _stands_on(seat: Seat, garbage: Blocks) -> bool:
    """Whether a sequence found such blocks there."""
    block_ids = garbage.get(seat.replica)
    if not block_ids:
        return False
    num_found = seat.num_found // seat.replica.block_size
    return not block_ids.isdisjoint(seat.block_ids[:num_found])
