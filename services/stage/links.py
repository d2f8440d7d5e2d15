"""The links of one session: from replicas of the stage before, and to those of the next one.

A link that breaks is taken out here and nothing else happens: orders may go on to name it. What
would come over it never comes, what should leave over it goes nowhere.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Protocol

from penstock.v1 import stage_pb2

from core.errors import MalformedMessage, ProtocolViolation
from core.pipeline.batch import MicroBatch
from core.wire.frames import FrameAssembler
from services.common.channels import Dial
from services.stage.downstream_link import DownstreamLink, LinkListener
from services.stage.job import Route
from services.stage.upstream_link import UpstreamLink, UpstreamListener


class LinksListener(LinkListener, UpstreamListener, Protocol):
    """Hears of all links, on the event loop."""


class Links:
    """Links by id. Belongs to the event loop's thread.

    Each id serves once: those of links that are gone are kept, without the link.
    """

    def __init__(
        self,
        listener: LinksListener,
        *,
        hidden_size: int,
        codec: str,
        initial_credits: int,
        offers_shortcuts: bool,
        dial: Dial,
    ) -> None:
        self._listener = listener
        self._hidden_size = hidden_size
        self._codec = codec
        self._initial_credits = initial_credits
        self._offers_shortcuts = offers_shortcuts
        self._dial = dial
        self._upstream: dict[int, UpstreamLink | None] = {}
        self._downstream: dict[int, DownstreamLink | None] = {}

    def open_upstream(self, link_id: int) -> UpstreamLink:
        """Takes a link for one stream. Raises ProtocolViolation when another one has had it."""
        _require_new(link_id, self._upstream)
        link = UpstreamLink(
            self._listener,
            assembler=FrameAssembler(self._hidden_size, self._codec, link_id=link_id),
            initial_credits=self._initial_credits,
            offers_shortcut=self._offers_shortcuts,
        )
        self._upstream[link_id] = link
        return link

    def end_upstream(self, link_id: int) -> None:
        """Ends a link whose stream is over."""
        link, self._upstream[link_id] = self._upstream[link_id], None
        if link is not None:
            link.close()

    def open_downstream(self, order: stage_pb2.OpenDownstream) -> None:
        """Dials a replica; the listener hears how that went."""
        _require_new(order.link_id, self._downstream)
        self._downstream[order.link_id] = DownstreamLink(
            self._listener, order, max_unsent_frames=self._initial_credits, dial=self._dial
        )

    def forget_downstream(self, link_id: int) -> None:
        """Takes out a link that broke."""
        self._downstream[link_id] = None

    def route(self, message: stage_pb2.MicroBatch) -> Route:
        """The links that an order names. Raises ProtocolViolation where one never was."""
        upstream, downstream = message.upstream_link, message.downstream_link
        if upstream:
            _require_known(upstream, self._upstream)
        if downstream:
            _require_known(downstream, self._downstream)
        return Route(
            upstream_link=upstream,
            downstream_link=downstream,
            outlet=self._downstream[downstream] if downstream else None,
        )

    def expect(self, batch: MicroBatch, route: Route) -> None:
        """Notes that a micro-batch is scheduled, on the link that its activations come over."""
        link = self._upstream.get(route.upstream_link)
        if link is not None:
            link.expect(batch.id, batch.num_rows)

    def abandon(self, micro_batch_ids: Iterable[int]) -> None:
        """Drops what has come and will come of these micro-batches."""
        for link in self._upstream.values():
            if link is not None:
                link.abandon(micro_batch_ids)

    def give_back(self, route: Route, num_frames: int) -> None:
        """Notes that so many frames of a micro-batch have been used up."""
        link = self._upstream.get(route.upstream_link)
        if link is not None:
            link.give_back(num_frames)

    def close(self) -> None:
        """Ends them all; the listener hears nothing more."""
        for link in (*self._upstream.values(), *self._downstream.values()):
            if link is not None:
                link.close()


def _require_new(link_id: int, known: Container[int]) -> None:
    if link_id == 0:
        raise MalformedMessage("a link has an id above 0")
    if link_id in known:
        raise ProtocolViolation(f"link {link_id} has been opened before; a new one needs a new id")


def _require_known(link_id: int, known: Container[int]) -> None:
    if link_id not in known:
        raise ProtocolViolation(f"a micro-batch names link {link_id}, which was never opened here")
