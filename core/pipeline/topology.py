"""Which replicas and links there are, and the paths that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from itertools import pairwise
from math import inf

from core.pipeline.replica import Replica

Way = tuple[Replica, ...]  # one replica of each stage

# Costs of a replica that is new to a sequence, and of one that it should leave.
_NEW = 1.0
_SPARE = 1e3
_LEFT = 1e6


class Topology:
    """The replicas that live, stage by stage, and which of them are linked."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.replicas: dict[int, Replica] = {}  # by id
        self._chosen_S: list[str | None] = [None] * num_stages
        self._links: set[tuple[int, int]] = set()

    @property
    def chosen(self) -> tuple[str, ...] | None:
        """The weights that new sequences take; None while a stage has never been ready."""
        chosen_S = [weights for weights in self._chosen_S if weights is not None]
        return tuple(chosen_S) if len(chosen_S) == self.num_stages else None

    def choose(self, stage_index: int, weights: str) -> None:
        """Takes these weights for new sequences."""
        self._chosen_S[stage_index] = weights

    def add(self, replica: Replica) -> None:
        """Takes in a replica. The first one of a stage chooses its weights."""
        self.replicas[replica.id] = replica
        if self._chosen_S[replica.stage_index] is None:
            self.choose(replica.stage_index, replica.facts.weights)

    def remove(self, replica: Replica) -> None:
        """Forgets a replica and its links."""
        replica.is_lost = True
        del self.replicas[replica.id]
        self._links = {link for link in self._links if replica.id not in link}

    def link(self, upstream_id: int, downstream_id: int) -> None:
        """A link stands."""
        if upstream_id in self.replicas and downstream_id in self.replicas:
            self._links.add((upstream_id, downstream_id))

    def unlink(self, upstream_id: int, downstream_id: int) -> None:
        """A link has broken."""
        self._links.discard((upstream_id, downstream_id))

    def sibling(self, stage_index: int) -> Replica | None:
        """Any replica of a stage."""
        of_stage = (r for r in self.replicas.values() if r.stage_index == stage_index)
        return next(of_stage, None)

    def lanes(self, weights: tuple[str, ...], *, even_draining: bool = False) -> list[Way]:
        """The ways that share the work: as many as the stage with most replicas has, each with the
        next replica of every stage. Those whose links do not stand are left out."""
        usable_S = [
            self._usable(stage, weights[stage], even_draining=even_draining)
            for stage in range(self.num_stages)
        ]
        if not all(usable_S):
            return []
        ways = [
            tuple(usable[number % len(usable)] for usable in usable_S)
            for number in range(max(map(len, usable_S)))
        ]
        return [way for way in ways if self._stands(way)]

    def best_way(
        self, weights: tuple[str, ...], *, kept: List[Replica], crowd: Callable[[Replica], float]
    ) -> Way | None:
        """The way that loses fewest of the replicas `kept`; among equals, the least crowded one.

        `crowd` is below 1, or infinite where a replica has no room for a sequence that is new to
        it. None where no way stands.
        """
        ways: dict[Replica, tuple[float, Way]] = {}
        for stage in range(self.num_stages):
            further: dict[Replica, tuple[float, Way]] = {}
            for replica, cost in self._costs(stage, weights[stage], kept, crowd):
                before = (way for end, way in ways.items() if (end.id, replica.id) in self._links)
                start = min(before, key=lambda way: way[0], default=None) if stage else (0.0, ())
                if start is not None:
                    further[replica] = (start[0] + cost, (*start[1], replica))
            ways = further
        best = min(ways.values(), key=lambda way: way[0], default=None)
        return None if best is None else best[1]

    def _costs(
        self, stage: int, weights: str, kept: List[Replica], crowd: Callable[[Replica], float]
    ) -> Iterator[tuple[Replica, float]]:
        for replica in self.replicas.values():
            if replica.stage_index != stage or replica.facts.weights != weights:
                continue
            cost = _LEFT if replica.is_left else 0.0
            if replica not in kept:
                if replica.is_draining:
                    continue
                # Less than a further replica, however crowded.
                cost += (_SPARE if replica.facts.is_spare else _NEW) + (
                    crowd(replica) / self.num_stages
                )
            if cost < inf:
                yield replica, cost

    def _usable(self, stage: int, weights: str, *, even_draining: bool) -> list[Replica]:
        """In order of id; spare ones only where there are no others, then those that rest, then
        draining ones."""
        all_of = [
            replica
            for replica in self.replicas.values()
            if replica.stage_index == stage and replica.facts.weights == weights
        ]
        staying = [replica for replica in all_of if not replica.is_draining]
        brisk = [replica for replica in staying if not replica.is_resting]
        first = [replica for replica in brisk if not replica.facts.is_spare]
        return first or brisk or staying or (all_of if even_draining else [])

    def _stands(self, way: Way) -> bool:
        return all(
            (upstream.id, downstream.id) in self._links for upstream, downstream in pairwise(way)
        )
