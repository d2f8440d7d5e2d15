"""Why a compute thread had nothing to compute."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Starvation:
    """Nanoseconds without a micro-batch that could be computed, by cause."""

    schedule_ns: int = 0  # nothing was scheduled
    upstream_ns: int = 0  # scheduled, and the stages before were not done
    wire_ns: int = 0  # the order, the activations or credit were on their way
    serialise_ns: int = 0  # activations were being turned into frames or back

    @property
    def total_ns(self) -> int:
        return self.schedule_ns + self.upstream_ns + self.wire_ns + self.serialise_ns

    def __add__(self, other: Starvation) -> Starvation:
        return Starvation(
            schedule_ns=self.schedule_ns + other.schedule_ns,
            upstream_ns=self.upstream_ns + other.upstream_ns,
            wire_ns=self.wire_ns + other.wire_ns,
            serialise_ns=self.serialise_ns + other.serialise_ns,
        )

    def __sub__(self, other: Starvation) -> Starvation:
        negative = (-value for value in astuple(other))
        return self + Starvation(**dict(zip(Starvation.__slots__, negative, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """When something reached the compute thread's inbox, and what took it there."""

    at_ns: int  # of time.perf_counter_ns
    wire_ns: int = 0  # from its sender's hands
    serialise_ns: int = 0  # made into frames and back


NOT_STARVED = Starvation()


def wire_ns_since(sent_unix_ns: int) -> int:
    """How long a message was on its way. Right as far as the two hosts' clocks agree."""
    return max(0, time.time_ns() - sent_unix_ns) if sent_unix_ns else 0


def attribute(
    *, since_ns: int, until_ns: int, order: Arrival, activations: Arrival | None
) -> Starvation:
    """Why a thread waited from `since_ns` to `until_ns`, when it could compute the order at last.

    What came last held it up: first the order, then the activations. Of the time until each
    came, the latest part was its way over the wire, before that its making, and the rest
    waiting for whoever makes it. What remains is the wake-up, or credit that had to come.
    """
    ordered_ns = min(max(order.at_ns, since_ns), until_ns)
    order_wire_ns = min(ordered_ns - since_ns, order.wire_ns)
    arrived_ns = ordered_ns
    if activations is not None:
        arrived_ns = min(max(activations.at_ns, ordered_ns), until_ns)
    frames_ns = arrived_ns - ordered_ns
    frames_wire_ns = min(frames_ns, activations.wire_ns) if activations is not None else 0
    serialise_ns = 0
    if activations is not None:
        serialise_ns = min(frames_ns - frames_wire_ns, activations.serialise_ns)
    return Starvation(
        schedule_ns=ordered_ns - since_ns - order_wire_ns,
        upstream_ns=frames_ns - frames_wire_ns - serialise_ns,
        wire_ns=order_wire_ns + frames_wire_ns + until_ns - arrived_ns,
        serialise_ns=serialise_ns,
    )
