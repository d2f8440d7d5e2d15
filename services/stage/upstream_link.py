"""A stream that brings activations from a replica of the stage before this one.

Credits, in frames, bound what waits here: the first grant covers two of the biggest
micro-batches, and frames are granted anew once their micro-batch has been computed.
Grants are gathered to a quarter of the first one, since each costs a message.

A link that breaks takes with it what it had not brought whole, and nothing else: those
micro-batches wait until the coordinator abandons them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import Protocol

from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import MalformedMessage, ProtocolViolation
from core.wire.frames import CompleteActivations, FrameAssembler
from services.common.shortcut import Door, Shortcut, parse
from services.stage.outbox import Outbox
from services.stage.starvation import Arrival, wire_ns_since


class UpstreamListener(Protocol):
    """Hears of complete activations, on the event loop."""

    def on_activations(self, activations: CompleteActivations, arrival: Arrival) -> None: ...

    def on_assembled(self, duration_ns: int) -> None:
        """Turning a frame into activations took `duration_ns`."""


class UpstreamLink:
    """The receiving end of a link. Belongs to the event loop's thread.

    Grants the first credits at once.
    """

    def __init__(
        self,
        listener: UpstreamListener,
        *,
        assembler: FrameAssembler,
        initial_credits: int,
        offers_shortcut: bool = True,
    ) -> None:
        self.responses: Outbox[stage_pb2.ActivateResponse] = Outbox()
        self._listener = listener
        self._assembler = assembler
        self._initial_credits = initial_credits
        self._outstanding = 0  # frames that may still come
        self._ungranted = 0
        self._door = Door(self._on_entered) if offers_shortcut else None
        self._shortcut: Shortcut | None = None
        self._grant(initial_credits, door=self._door)

    def expect(self, micro_batch_id: int, num_rows: int) -> None:
        """Notes that a micro-batch is scheduled."""
        try:
            complete = self._assembler.expect(micro_batch_id, num_rows)
        except ProtocolViolation as error:  # what came does not fit: the link is to blame
            self.close(error)
            return
        if complete is not None:  # they waited for their order
            self._listener.on_activations(complete, Arrival(at_ns=time.perf_counter_ns()))

    def take(self, frame: tensor_pb2.ActivationFrame) -> None:
        """Takes a frame; raises ProtocolViolation when it does not fit."""
        if self._outstanding == 0:
            raise ProtocolViolation("a frame came without credit")
        self._outstanding -= 1
        started_ns, wire_ns = time.perf_counter_ns(), wire_ns_since(frame.sent_unix_ns)
        complete = self._assembler.add(frame)
        now_ns = time.perf_counter_ns()
        self._listener.on_assembled(now_ns - started_ns)
        self.give_back(self._assembler.take_dropped())
        if complete is not None:
            serialise_ns = frame.serialise_ns + now_ns - started_ns
            arrival = Arrival(at_ns=now_ns, wire_ns=wire_ns, serialise_ns=serialise_ns)
            self._listener.on_activations(complete, arrival)

    def abandon(self, micro_batch_ids: Iterable[int]) -> None:
        """Drops what has come and will come of these; frames of others are taken as ever."""
        for micro_batch_id in micro_batch_ids:
            self._assembler.abandon(micro_batch_id)
        self.give_back(self._assembler.take_dropped())

    def give_back(self, num_frames: int) -> None:
        """Notes that so many frames have been used up."""
        self._ungranted += num_frames
        if self._ungranted * 4 >= self._initial_credits:
            self._grant(self._ungranted)
            self._ungranted = 0

    def close(self, error: Exception | None = None) -> None:
        """Ends the stream, with `error` if given."""
        self.responses.close(error)
        if self._door is not None:
            self._door.close()
        if self._shortcut is not None:
            self._shortcut.close()

    def _on_entered(self, connection: socket.socket) -> None:
        self._shortcut = Shortcut(connection, on_message=self._take_message, on_end=self.close)

    def _take_message(self, message: bytes) -> None:
        request = parse(stage_pb2.ActivateRequest, message)
        if not request.HasField("frame"):
            raise MalformedMessage("all messages of a shortcut carry one frame")
        self.take(request.frame)

    def _grant(self, credits: int, *, door: Door | None = None) -> None:
        self._outstanding += credits
        response = stage_pb2.ActivateResponse(credits=credits)
        if door is not None:
            response.shortcut, response.shortcut_token = door.address, door.token
        self.responses.put(response)
