"""Activations <-> frames.

A micro-batch's activations are cut at row boundaries into frames of at most 1 MiB,
so that the one row of a decode never waits long behind a prefill. Frames are
numbered along their link, and carry a checksum (XXH3-64) over their bytes. What
arrives is checked field by field against the loaded manifest and against the
schedule, never against what the peer claims.

Letters: T rows, H hidden size, or the elements that it takes in the wire's codec.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash
from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import ChecksumMismatch, MalformedMessage, ProtocolViolation
from core.wire.codecs import Activations, codec_named

MAX_FRAME_BYTES = 1024 * 1024


def encode_frames(
    hidden_TH: Activations,
    *,
    link_id: int,
    micro_batch_id: int,
    first_sequence_number: int,
    codec: str,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> list[stage_pb2.ActivateRequest]:
    """Returns the frames of a micro-batch's activations, in row order, as they are sent.

    `hidden_TH` has at least one row, is C-contiguous and in the codec's dtype. Its bytes are
    copied: the array may be overwritten afterwards. A row bigger than
    `max_frame_bytes` gets a frame of its own.
    """
    form = codec_named(codec)
    assert len(hidden_TH) > 0
    assert hidden_TH.dtype == form.dtype
    assert hidden_TH.flags.c_contiguous
    requests = []
    for number, (first, end) in enumerate(_cuts(hidden_TH, max_frame_bytes)):
        started_ns = time.perf_counter_ns()
        data = hidden_TH[first:end].tobytes()
        request = stage_pb2.ActivateRequest()
        frame = request.frame  # filled in place: a frame set as a whole is copied again
        frame.link_id = link_id
        frame.micro_batch_id = micro_batch_id
        frame.sequence_number = first_sequence_number + number
        frame.codec = form.number
        frame.first_row = first
        frame.num_rows = end - first
        frame.hidden_size = form.hidden_size(hidden_TH.shape[1])
        frame.data = data
        frame.checksum = xxhash.xxh3_64_intdigest(data)
        frame.serialise_ns = time.perf_counter_ns() - started_ns
        requests.append(request)
    return requests


@dataclass(frozen=True, kw_only=True)
class CompleteActivations:
    """All rows of a micro-batch. `hidden_TH` is read-only where it came in one frame."""

    micro_batch_id: int
    hidden_TH: Activations
    num_frames: int


@dataclass
class _Partial:
    """What has come of a micro-batch so far; `num_rows` is None until it is scheduled.

    Of one that is abandoned the rows are counted, and not kept.
    """

    num_rows: int | None = None
    num_rows_seen: int = 0
    parts: list[Activations] = field(default_factory=list)
    is_abandoned: bool = False


class FrameAssembler:
    """Puts the frames of one link together, and refuses whatever does not fit.

    Schedule and frames come over different streams: a frame may be there before its
    micro-batch is expected, and is then kept. (Credits bound how many.) Micro-batches
    may interleave on a link, but begin in the order of their ids; the rows of each come in
    order. After an error the assembler is of no more use: its link ends.
    """

    def __init__(self, hidden_size: int, codec: str, *, link_id: int) -> None:
        self._hidden_size = hidden_size
        self._codec = codec_named(codec)
        self._link_id = link_id
        self._next_sequence_number = 0
        self._open: dict[int, _Partial] = {}
        self._abandoned: set[int] = set()  # of those that are open
        self._last_expected = -1
        self._num_dropped = 0

    @property
    def num_open(self) -> int:
        """Micro-batches of which something is expected or kept."""
        return len(self._open)

    def expect(self, micro_batch_id: int, num_rows: int) -> CompleteActivations | None:
        """Notes that a micro-batch is scheduled; returns it if all its frames are there already.

        Raises ProtocolViolation when ids do not ascend, or when more rows came than
        are scheduled.
        """
        if micro_batch_id <= self._last_expected:
            raise ProtocolViolation(
                f"micro-batch {micro_batch_id} is scheduled after {self._last_expected}"
            )
        self._last_expected = micro_batch_id
        partial = self._open.setdefault(micro_batch_id, _Partial())
        partial.num_rows = num_rows
        return self._complete(micro_batch_id, partial)

    def abandon(self, micro_batch_id: int) -> None:
        """Drops what has come of a micro-batch that is expected, and what will come.

        Others are left alone.
        """
        partial = self._open.get(micro_batch_id)
        if partial is None or partial.num_rows is None or partial.is_abandoned:
            return
        partial.is_abandoned = True
        self._abandoned.add(micro_batch_id)
        self._num_dropped += len(partial.parts)
        partial.parts.clear()

    def take_dropped(self) -> int:
        """Returns how many frames have been dropped since the last call."""
        num_dropped, self._num_dropped = self._num_dropped, 0
        return num_dropped

    def add(self, frame: tensor_pb2.ActivationFrame) -> CompleteActivations | None:
        """Takes a frame; returns its micro-batch's activations when it was the last one missing.

        Raises MalformedMessage (the frame does not fit the manifest or itself),
        ChecksumMismatch, or ProtocolViolation (it does not fit the state of the link).
        """
        data = frame.data
        self._check_form(frame, len(data))
        partial = self._check_place(frame)
        if xxhash.xxh3_64_intdigest(data) != frame.checksum:
            raise ChecksumMismatch(
                f"the bytes of frame {frame.sequence_number} changed on their way"
            )
        part = np.frombuffer(data, self._codec.dtype).reshape(frame.num_rows, -1)
        self._codec.check(part, hidden_size=self._hidden_size)
        if partial.is_abandoned:
            self._num_dropped += 1
        else:
            partial.parts.append(part)
        partial.num_rows_seen += frame.num_rows
        self._open[frame.micro_batch_id] = partial
        self._next_sequence_number += 1
        return self._complete(frame.micro_batch_id, partial)

    def _check_form(self, frame: tensor_pb2.ActivationFrame, size_bytes: int) -> None:
        """Checks what must hold whatever the state."""
        row_bytes = self._codec.row_bytes(self._hidden_size)
        if frame.num_rows == 0:
            raise MalformedMessage(f"frame {frame.sequence_number} has no rows")
        # Credits count frames: what waits for its order is bounded only if each of them is.
        if size_bytes > max(MAX_FRAME_BYTES, row_bytes):
            raise MalformedMessage(f"frame {frame.sequence_number} has {size_bytes} bytes")
        checks = (
            ("codec", frame.codec, self._codec.number),
            ("hidden_size", frame.hidden_size, self._hidden_size),
            ("size of data", size_bytes, frame.num_rows * row_bytes),
        )
        for name, seen, wanted in checks:
            if seen != wanted:
                raise MalformedMessage(
                    f"{name} of frame {frame.sequence_number} is {seen}; wanted is {wanted}"
                )

    def _check_place(self, frame: tensor_pb2.ActivationFrame) -> _Partial:
        """Checks link, order and schedule; returns the state of the frame's micro-batch."""
        if frame.link_id != self._link_id:
            raise ProtocolViolation(
                f"a frame of link {frame.link_id} came over link {self._link_id}"
            )
        if frame.sequence_number != self._next_sequence_number:
            raise ProtocolViolation(
                f"frame {frame.sequence_number} came where {self._next_sequence_number} was due"
            )
        partial = self._open.get(frame.micro_batch_id)
        if partial is None:
            if frame.micro_batch_id <= self._last_expected:
                raise ProtocolViolation(
                    f"micro-batch {frame.micro_batch_id} is complete or was never scheduled"
                )
            partial = _Partial()
        if frame.first_row != partial.num_rows_seen:
            raise ProtocolViolation(
                f"row {frame.first_row} of micro-batch {frame.micro_batch_id} came where "
                f"{partial.num_rows_seen} was due"
            )
        if partial.num_rows is not None and frame.first_row + frame.num_rows > partial.num_rows:
            raise _too_many(frame.micro_batch_id, frame.first_row + frame.num_rows, partial)
        return partial

    def _complete(self, micro_batch_id: int, partial: _Partial) -> CompleteActivations | None:
        if partial.num_rows is None or partial.num_rows_seen < partial.num_rows:
            return None
        if partial.num_rows_seen > partial.num_rows:
            raise _too_many(micro_batch_id, partial.num_rows_seen, partial)
        del self._open[micro_batch_id]
        if self._abandoned:
            self._forget_abandoned(micro_batch_id)
        if partial.is_abandoned:
            return None
        parts = partial.parts
        hidden_TH = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return CompleteActivations(
            micro_batch_id=micro_batch_id, hidden_TH=hidden_TH, num_frames=len(parts)
        )

    def _forget_abandoned(self, complete_id: int) -> None:
        """Forgets those that will not come any more: later ones have begun."""
        self._abandoned.discard(complete_id)
        for id in [id for id in self._abandoned if id < complete_id]:
            if self._open[id].num_rows_seen == 0:
                self._abandoned.remove(id)
                del self._open[id]


def _cuts(hidden_TH: Activations, max_frame_bytes: int) -> Iterator[tuple[int, int]]:
    num_rows, width = hidden_TH.shape
    rows_per_frame = max(1, max_frame_bytes // (width * hidden_TH.itemsize))
    for first in range(0, num_rows, rows_per_frame):
        yield first, min(first + rows_per_frame, num_rows)


def _too_many(micro_batch_id: int, num_rows: int, partial: _Partial) -> ProtocolViolation:
    return ProtocolViolation(
        f"micro-batch {micro_batch_id} has {partial.num_rows} rows, {num_rows} came"
    )
