"""The stream that brings activations from the stage before this one.

Credits, in frames, bound what waits here: the first grant covers two of the biggest
micro-batches, and frames are granted anew once their micro-batch has been computed.
Grants are gathered to a quarter of the first one, since each costs a message.
"""

from __future__ import annotations

import time
from typing import Protocol

from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import ProtocolViolation
from core.wire.frames import CompleteActivations, FrameAssembler
from services.stage.outbox import Outbox


class UpstreamListener(Protocol):
    """Hears of complete activations, on the event loop."""

    def on_activations(self, activations: CompleteActivations) -> None: ...

    def on_assembled(self, duration_ns: int) -> None:
        """Turning a frame into activations took `duration_ns`."""


class UpstreamLink:
    """The receiving end of a session's one link. Belongs to the event loop's thread."""

    def __init__(
        self, listener: UpstreamListener, *, assembler: FrameAssembler, initial_credits: int
    ) -> None:
        self.responses: Outbox[stage_pb2.ActivateResponse] = Outbox()
        self._listener = listener
        self._assembler = assembler
        self._initial_credits = initial_credits
        self._outstanding = 0  # frames that may still come
        self._ungranted = 0
        self._taken = False

    def open(self) -> None:
        """Takes the link for one stream, and grants the first credits.

        Raises ProtocolViolation when another stream has had it.
        """
        if self._taken:
            raise ProtocolViolation("this epoch has had its link; a new one needs a new epoch")
        self._taken = True
        self._grant(self._initial_credits)

    def expect(self, micro_batch_id: int, num_rows: int) -> None:
        """Notes that a micro-batch is scheduled."""
        complete = self._assembler.expect(micro_batch_id, num_rows)
        if complete is not None:
            self._listener.on_activations(complete)

    def take(self, frame: tensor_pb2.ActivationFrame) -> None:
        """Takes a frame; raises ProtocolViolation when it does not fit."""
        if self._outstanding == 0:
            raise ProtocolViolation("a frame came without credit")
        self._outstanding -= 1
        started_ns = time.perf_counter_ns()
        complete = self._assembler.add(frame)
        self._listener.on_assembled(time.perf_counter_ns() - started_ns)
        if complete is not None:
            self._listener.on_activations(complete)

    def give_back(self, num_frames: int) -> None:
        """Notes that so many frames have been used up."""
        self._ungranted += num_frames
        if self._ungranted * 4 >= self._initial_credits:
            self._grant(self._ungranted)
            self._ungranted = 0

    def close(self, error: Exception | None = None) -> None:
        """Ends the stream, with `error` if given."""
        self._taken = True
        self.responses.close(error)

    def _grant(self, credits: int) -> None:
        self._outstanding += credits
        self.responses.put(stage_pb2.ActivateResponse(credits=credits))
