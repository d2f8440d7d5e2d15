"""What a session has the compute thread do, and hears of it.

Letters: T rows, H hidden size.
"""

from __future__ import annotations

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

    def step(self, batch: MicroBatch, hidden_TH: Activations | None) -> StepResult:
        """Applies the batch's updates, then computes it."""


Order = MicroBatch | SequenceUpdates


@dataclass(frozen=True, kw_only=True, slots=True)
class Performed:
    """An order that has been performed. Times are of `time.perf_counter_ns`, durations in ns.

    `requests` carry the activations downstream, `sampled` goes to the coordinator;
    both are empty for updates alone, and `num_sent` is None, or as `Listener.send_now` said.
    `wait_ns` is how long the micro-batch was ready and the thread busy with others,
    `stolen_ns` how much of `compute_ns` the thread did not run, and `starved` why there was
    nothing to compute before.
    """

    order: Order
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

    def send_now(
        self, requests: list[stage_pb2.ActivateRequest], sampled: SampledTokens | None
    ) -> int | None:
        """Sends a result from the compute thread, where there is a shortcut; never waits.

        Returns how many of the requests have left, while the others wait for credit; None when
        all is left to `on_performed`.
        """

    def on_opened(self) -> None: ...

    def on_performed(self, performed: Performed) -> None: ...

    def on_failure(self, error: Exception) -> None: ...


class Job:
    """What the compute thread does for one session: its numbers, and how far the link is.

    Frames that wait for credit are bounded: at `max_unsent_frames` the thread waits
    before it computes the next micro-batch.
    """

    def __init__(
        self,
        listener: Listener,
        *,
        epoch: int,
        codec: str,
        is_first: bool,
        max_unsent_frames: int,
    ) -> None:
        self.listener = listener
        self.epoch = epoch
        self.codec = codec
        self.is_first = is_first
        self.max_unsent_frames = max_unsent_frames
        self.num_emitted = 0  # written by the compute thread only
        self.num_sent = 0  # written by the event loop only
        self.held = False

    @property
    def has_room(self) -> bool:
        return self.num_emitted - self.num_sent < self.max_unsent_frames
