"""Which replicas and links there are, and the paths that they make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as List
from itertools import pairwise
from math import inf

from core.pipeline.cut import Cut, Part, find_cut
from core.pipeline.replica import Replica

Way = tuple[Replica, ...]  # their parts are a cut of the model

# Costs of a replica that is new to a sequence, and of one that it should leave.
_NEW = 1.0
_SPARE = 1e3
_LEFT = 1e6


class Topology:
    """The replicas that live, what they hold, and which of them are linked."""

    def __init__(self, num_layers: int) -> None:
        self.replicas: dict[int, Replica] = {}  # by id
        self.chosen: Cut | None = None  # what new sequences take, once there was a whole model
        self._num_layers = num_layers
        self._links: set[tuple[int, int]] = set()

    def add(self, replica: Replica) -> None:
        """Takes in a replica. The first ones that make a whole model choose the cut."""
        self.replicas[replica.id] = replica
        if self.chosen is None:
            parts = (one.part for one in self.replicas.values())
            self.chosen = find_cut(parts, num_layers=self._num_layers)

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

    def sibling(self, part: Part) -> Replica | None:
        """Any replica of the same layers."""
        alike = (one for one in self.replicas.values() if one.part.layers == part.layers)
        return next(alike, None)

    def has_all(self, cut: Cut) -> bool:
        """Whether there is a replica of each part."""
        return {replica.part for replica in self.replicas.values()}.issuperset(cut.parts)

    def lanes(self, cut: Cut, *, even_draining: bool = False) -> list[Way]:
        """The ways that share the work: as many as the part with most replicas has, each with the
        next replica of every part. Those whose links do not stand are left out."""
        usable_S = [self._usable(part, even_draining=even_draining) for part in cut.parts]
        if not all(usable_S):
            return []
        ways = [
            tuple(usable[number % len(usable)] for usable in usable_S)
            for number in range(max(map(len, usable_S)))
        ]
        return [way for way in ways if self._stands(way)]

    def best_way(
        self, parts: Collection[Part], *, kept: List[Replica], crowd: Callable[[Replica], float]
    ) -> Way | None:
        """The way over replicas of these parts that has fewest besides those `kept`; among equals,
        the least crowded one.

        `crowd` is below 1, or infinite where a replica has no room for a sequence that is new to
        it. None where no way stands.
        """
        ways: dict[Replica, tuple[float, Way]] = {}  # to the end of each replica
        costs = self._costs(parts, kept, crowd)
        for replica, cost in sorted(costs, key=lambda priced: priced[0].part.first_layer):
            if replica.part.first_layer == 0:
                ways[replica] = (cost, (replica,))
                continue
            before = (way for end, way in ways.items() if (end.id, replica.id) in self._links)
            start = min(before, key=lambda way: way[0], default=None)
            if start is not None:
                ways[replica] = (start[0] + cost, (*start[1], replica))
        whole = (way for end, way in ways.items() if end.part.end_layer == self._num_layers)
        best = min(whole, key=lambda way: way[0], default=None)
        return None if best is None else best[1]

    def _costs(
        self, parts: Collection[Part], kept: List[Replica], crowd: Callable[[Replica], float]
    ) -> Iterator[tuple[Replica, float]]:
        for replica in self.replicas.values():
            if replica.part not in parts:
                continue
            cost = _LEFT if replica.is_left else 0.0
            if replica not in kept:
                if replica.is_draining:
                    continue
                # Less than a further replica, however crowded.
                cost += (_SPARE if replica.facts.is_spare else _NEW) + (
                    crowd(replica) / self._num_layers
                )
            if cost < inf:
                yield replica, cost

    def _usable(self, part: Part, *, even_draining: bool) -> list[Replica]:
        """In order of id; spare ones only where there are no others, then those that rest, then
        draining ones."""
        all_of = [replica for replica in self.replicas.values() if replica.part == part]
        staying = [replica for replica in all_of if not replica.is_draining]
        brisk = [replica for replica in staying if not replica.is_resting]
        first = [replica for replica in brisk if not replica.facts.is_spare]
        return first or brisk or staying or (all_of if even_draining else [])

    def _stands(self, way: Way) -> bool:
        return all(
            (upstream.id, downstream.id) in self._links for upstream, downstream in pairwise(way)
        )
