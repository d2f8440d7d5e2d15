"""What a session has the compute thread do, and hears of it.

Letters: T rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.v1 import stage_pb2

from core.pipeline.batch import MicroBatch, SampledTokens, SequenceUpdates
from core.wire.codecs import Activations
from services.stage.starvation import NOT_STARVED, Starvation


class StepResult(Protocol):
    """What a step yields: activations for the next stage, or tokens on the last one."""

    @property
    def hidden_TH(self) -> Activations | None: ...

    @property
    def sampled(self) -> SampledTokens | None: ...


class StageEngine(Protocol):
    """What the compute thread needs of an engine."""

    def apply(self, updates: SequenceUpdates) -> None:
        """Changes sequences; raises ProtocolViolation when that does not fit."""

    def prepare(self, batch: MicroBatch) -> None:
        """Applies the batch's updates, and does what else of its step needs no activations.

        What follows is the step, or the batch is not computed at all.
        """

    def step(self, batch: MicroBatch, hidden_TH: Activations | None) -> StepResult:
        """Prepares the batch, where that has not been done, and computes it."""


Order = MicroBatch | SequenceUpdates


class Outlet(Protocol):
    """A link downstream, as the compute thread sees it.

    Frames that wait for credit are bounded: without room the thread waits before it computes the
    next micro-batch for this link. One that is broken has room for all, and takes nothing.
    """

    num_emitted: int  # frames made for it; the compute thread counts them
    num_sent: int  # of these; the event loop counts them

    @property
    def link_id(self) -> int: ...

    @property
    def has_room(self) -> bool: ...

    @property
    def is_broken(self) -> bool: ...

    def send(self, requests: Sequence[stage_pb2.ActivateRequest], *, made_ns: int) -> None:
        """Sends a micro-batch's frames after those before them; on the event loop."""

    def send_now(self, requests: Sequence[stage_pb2.ActivateRequest]) -> int | None:
        """Sends them from the compute thread, where there is a shortcut; never waits.

        Returns how many of them have left, while the others wait for credit; None when all is
        left to the event loop.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Where a micro-batch's activations come from, and where they leave to."""

    upstream_link: int = 0  # 0: none
    downstream_link: int = 0  # 0: none; the stage answers instead
    outlet: Outlet | None = None  # the link downstream, if it stands

    @property
    def answers(self) -> bool:
        return self.downstream_link == 0


NO_ROUTE = Route()


@dataclass(frozen=True, kw_only=True, slots=True)
class Performed:
    """An order that has been performed; an abandoned micro-batch counts as its updates.

    Times are of `time.perf_counter_ns`, durations in ns. `requests` carry the activations
    downstream, `sampled` goes to the coordinator; both are empty for updates alone, and where
    the link downstream is broken. `num_sent` is how many of the requests have left, 0 where
    `sampled` has, and None where all is left to the event loop.
    `wait_ns` is how long the micro-batch was ready and the thread busy with others,
    `stolen_ns` how much of `compute_ns` the thread did not run, and `starved` why there was
    nothing to compute before.
    """

    order: Order
    route: Route = NO_ROUTE
    requests: list[stage_pb2.ActivateRequest] = field(default_factory=list)
    sampled: SampledTokens | None = None
    num_sent: int | None = None
    num_frames_taken: int = 0
    compute_ns: int = 0
    wait_ns: int = 0
    stolen_ns: int = 0
    starved: Starvation = NOT_STARVED
    serialise_ns: int = 0
    send_ns: int = 0
    ended_ns: int = 0


class Listener(Protocol):
    """Hears on the event loop what the compute thread has done for one session."""

    def answer_now(self, sampled: SampledTokens) -> bool:
        """Sends tokens from the compute thread, where there is a shortcut; never waits.

        Returns False where that is left to `on_performed`.
        """

    def on_opened(self) -> None: ...

    def on_performed(self, performed: Performed) -> None: ...

    def on_failure(self, error: Exception) -> None: ...


class Job:
    """What the compute thread does for one session, and how far it is.

    `held` is written by the compute thread while it waits for room on a link, the other numbers
    while it computes: the event loop reads them at any time.
    """

    def __init__(self, listener: Listener, *, codec: str) -> None:
        self.listener = listener
        self.codec = codec
        self.held = False
        self.performed_id = 0  # the latest micro-batch that was performed or abandoned
        self.began_ns = 0  # the micro-batch in hand, of `time.perf_counter_ns`; 0: there is none
