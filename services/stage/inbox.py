"""What the compute thread of a stage may find in its inbox."""

from __future__ import annotations

from dataclasses import dataclass

from core.wire.frames import CompleteActivations
from services.stage.job import Job, Order, Route
from services.stage.starvation import Arrival


@dataclass(frozen=True, slots=True)
class Open:
    job: Job


@dataclass(frozen=True, slots=True)
class Close:
    job: Job


@dataclass(frozen=True, slots=True)
class Ordered:
    job: Job
    order: Order
    route: Route
    arrival: Arrival


@dataclass(frozen=True, slots=True)
class Arrived:
    job: Job
    activations: CompleteActivations
    arrival: Arrival


@dataclass(frozen=True, slots=True)
class Abandoned:
    job: Job
    micro_batch_ids: frozenset[int]


class RoomAgain:
    """A link has caught up, or broken."""


class Stop:
    """The process ends."""


Item = Open | Close | Ordered | Arrived | Abandoned | RoomAgain | Stop
