"""Who is to blame when nothing comes back."""

from __future__ import annotations

from typing import NamedTuple

from core.pipeline.flights import Flight, Traffic
from core.pipeline.path import Path
from core.pipeline.replica import Replica

# A path is given this many times the time that it should need for all in flight. Times vary with
# what else a node does; replicas that have really stopped are ten or more times over it.
_PATIENCE = 20.0
# No less: an operating system may take a process's core away for a second.
_LEAST_S = 2.0


class Stall(NamedTuple):
    """A replica that holds everything up, and how one can tell."""

    culprit: Replica
    reason: str


def find_stall(traffic: Traffic, now_s: float, *, timeout_s: float) -> Stall | None:
    """The oldest stall, if there is one."""
    oldest_of: dict[Path, Flight] = {}
    for flight in traffic.flights.values():
        oldest_of.setdefault(flight.path, flight)
    for path, flight in oldest_of.items():
        waited_s = now_s - max(flight.launched_s, path.returned_s)
        if waited_s > min(timeout_s, _LEAST_S) and waited_s > _limit_s(path, timeout_s):
            return Stall(
                _culprit(flight),
                f"micro-batch {flight.micro_batch_id} has been held up for {waited_s:.1f} s",
            )
    return None


def begin_anew(traffic: Traffic, now_s: float) -> None:
    """Counts from now on: nobody listened, so that nobody can be blamed."""
    for flight in traffic.flights.values():
        flight.path.returned_s = now_s


def _limit_s(path: Path, timeout_s: float) -> float:
    """How long it may take until something returns: from measured times, once there are."""
    if not all(replica.times.are_known for replica in path.replicas):
        return timeout_s
    expected_s = path.policy.hops_s + sum(
        replica.times.overlapped.seconds(flight.rows, flight.pairs)
        for replica in path.replicas
        for flight in replica.flights.values()
    )
    return min(timeout_s, max(_LEAST_S, _PATIENCE * expected_s))


def _culprit(flight: Flight) -> Replica:
    """The first on the way that has not performed it; where that waits for an older micro-batch of
    another path, whoever holds that one up. The last one, where all say that they have."""
    for replica in flight.replicas:
        if replica.performed_id >= flight.micro_batch_id:
            continue
        for other_id, other in replica.flights.items():
            if replica.performed_id < other_id < flight.micro_batch_id:
                return _culprit(other)
        return replica
    return flight.replicas[-1]
