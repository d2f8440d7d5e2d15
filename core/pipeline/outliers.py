"""Replicas that take many times as long as their siblings rest, while others can do their work.

What a replica reports is held against the times of the fastest sibling with the same weights. One
that is far slower in most of its latest micro-batches gets nothing more, and its sequences leave
it. After a rest it is taken to be as fast as its siblings, until it has been measured again; each
rest is twice as long as the one before (outlier ejection, as load balancers do it). Slow is not
wrong: where there is no sibling it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence as List

from core.pipeline.flights import Observations
from core.pipeline.replica import Replica
from core.pipeline.topology import Topology

# So many times the time of a sibling. Without the replica the stage loses less than a sixth of
# what it can do, and the sequences on it gain more.
_SLOW = 5.0
# A micro-batch's share in the judgement, and the judgement from which a replica rests: 22 in a row
# suffice, a core that was taken away for a moment does not.
_SHARE, _SURE = 1 / 16, 0.75
_FIRST_REST_S, _MOST_REST_S = 10.0, 320.0
_REVIEW_S = 0.25


class Outliers:
    """Judges the replicas of a pipeline."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._reviewed_s = 0.0

    def judge(self, replica: Replica, observations: List[Observations]) -> None:
        """Holds what a replica has reported against its siblings."""
        siblings = self._siblings(replica)
        for seen in observations:
            for rows, pairs, seconds in zip(seen.rows, seen.pairs, seen.seconds, strict=True):
                is_slow = any(
                    seconds > _SLOW * sibling.times.overlapped.seconds(rows, pairs)
                    for sibling in siblings
                )
                replica.slow_share += (is_slow - replica.slow_share) * _SHARE

    def review(self, now_s: float) -> bool:
        """Lets replicas rest, and come back; whether any does."""
        if now_s - self._reviewed_s < _REVIEW_S:
            return False
        self._reviewed_s = now_s
        replicas = self._topology.replicas.values()
        slow = [one for one in replicas if not one.is_resting and one.slow_share > _SURE]
        rested = [one for one in replicas if one.is_resting and now_s >= one.rests_until_s]
        for replica in slow:
            replica.rest_s = min(2 * replica.rest_s, _MOST_REST_S) or _FIRST_REST_S
            replica.is_resting, replica.rests_until_s = True, now_s + replica.rest_s
        for replica in rested:
            self._bring_back(replica)
        return bool(slow or rested)

    def _bring_back(self, replica: Replica) -> None:
        replica.is_resting, replica.slow_share = False, 0.0
        siblings = self._siblings(replica)
        if siblings:
            fastest = min(siblings, key=lambda sibling: sibling.cycle_s(1))
            replica.times.become_like(fastest.times)

    def _siblings(self, replica: Replica) -> list[Replica]:
        """Those that could take its sequences, and whose times are known."""
        return [
            other
            for other in self._topology.replicas.values()
            if other is not replica
            and other.part == replica.part
            and other.times.are_known
            and not (other.is_draining or other.is_resting)
        ]
