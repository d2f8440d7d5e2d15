"""The links between replicas: each is connected with all that hold the layers behind its own.

A link that breaks, or cannot be had, is followed by another one with an id of its own, for as long
as both ends are open. Where certificates name the stages, links that a replica would refuse are not
dialled: it takes activations from the stage before its own alone.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Protocol

from penstock.v1 import stage_pb2

from services.coordinator.backoff import Backoff
from services.coordinator.replica_link import Incarnation


class LinkListener(Protocol):
    """Who is told what becomes of links."""

    def on_link_ready(self, upstream: Incarnation, downstream: Incarnation) -> None: ...

    def on_link_lost(self, upstream: Incarnation, downstream: Incarnation, reason: str) -> None: ...


def joins_up(upstream: Incarnation, downstream: Incarnation) -> bool:
    """Whether a link between two replicas makes sense, and the lower one would take it."""
    if upstream.layers[1] != downstream.layers[0]:
        return False
    index = upstream.link.certified_index
    return index is None or index + 1 == downstream.link.certified_index


class NeighbourLinks:
    """All links between the replicas that are open."""

    def __init__(self, listener: LinkListener) -> None:
        self._listener = listener
        self._ids = itertools.count(1)
        self._open: dict[int, Incarnation] = {}
        self._links: dict[tuple[int, int], _Link] = {}  # by replica ids, upstream first
        self._standing_ids: dict[tuple[int, int], int] = {}  # of these, those that stand

    def id_of(self, upstream_id: int, downstream_id: int) -> int:
        """The link that stands between two replicas."""
        return self._standing_ids[upstream_id, downstream_id]

    def connects(self, upstream: Incarnation, downstream: Incarnation) -> bool:
        """Whether a link stands between two replicas."""
        return (upstream.replica_id, downstream.replica_id) in self._standing_ids

    def add(self, replica: Incarnation) -> None:
        """Connects a replica that has opened with its neighbours."""
        for other in self._open.values():
            if joins_up(other, replica):
                self._connect(other, replica)
            elif joins_up(replica, other):
                self._connect(replica, other)
        self._open[replica.replica_id] = replica

    def remove(self, replica: Incarnation) -> None:
        """Forgets the links of a replica that is lost, and tells nobody."""
        if self._open.pop(replica.replica_id, None) is None:
            return
        for key in [key for key in self._links if replica.replica_id in key]:
            self._links.pop(key).cancel()
            self._standing_ids.pop(key, None)

    def on_state(self, upstream: Incarnation, state: stage_pb2.LinkState) -> None:
        """Takes what a replica says of a link; links that were given up are ignored."""
        for link in self._links_from(upstream):
            if link.link_id != state.link_id:
                continue
            if state.stands:
                self._on_stands(link)
            else:
                self._on_broken(link, state.problem)

    def _links_from(self, upstream: Incarnation) -> Iterator[_Link]:
        return (link for link in self._links.values() if link.upstream is upstream)

    def _connect(self, upstream: Incarnation, downstream: Incarnation) -> None:
        link = _Link(upstream, downstream, self._ids)
        self._links[link.key] = link
        link.dial()

    def _on_stands(self, link: _Link) -> None:
        link.backoff.reset()
        self._standing_ids[link.key] = link.link_id
        self._listener.on_link_ready(link.upstream, link.downstream)

    def _on_broken(self, link: _Link, reason: str) -> None:
        if self._standing_ids.pop(link.key, None) is not None:
            self._listener.on_link_lost(link.upstream, link.downstream, reason)
        link.dial_again()


class _Link:
    """Two neighbours that shall be connected."""

    def __init__(self, upstream: Incarnation, downstream: Incarnation, ids: Iterator[int]) -> None:
        self.upstream = upstream
        self.downstream = downstream
        self.link_id = 0  # of the latest attempt
        self.backoff = Backoff()
        self._ids = ids
        self._timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.upstream.replica_id, self.downstream.replica_id

    def dial(self) -> None:
        self.link_id = next(self._ids)
        order = stage_pb2.OpenDownstream(
            link_id=self.link_id,
            address=self.downstream.place.address,
            epoch=self.downstream.epoch,
        )
        self.upstream.send(stage_pb2.ControlRequest(open_downstream=order))

    def dial_again(self) -> None:
        """After a pause that grows with each attempt that fails."""
        self.link_id = 0  # nothing more is to be heard of this one
        self._timer = asyncio.get_running_loop().call_later(self.backoff.take_s(), self.dial)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
