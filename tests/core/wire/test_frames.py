"""Frames: exact bytes, round trips, and refusal of everything that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from penstock.v1 import tensor_pb2

from core.errors import ChecksumMismatch, InvalidInput, MalformedMessage, ProtocolViolation
from core.kernels.blocks.reference import encode_rows
from core.wire.codecs import codec_named
from core.wire.frames import MAX_FRAME_BYTES, FrameAssembler, encode_frames

HIDDEN = 6
LINK = 3


def activations(num_rows: int, *, codec: str = "f32", seed: int = 0) -> np.ndarray:
    if codec == "int8":
        rows_TH = np.random.default_rng(seed).normal(size=(num_rows, HIDDEN))
        return encode_rows(rows_TH.astype(np.float32))
    dtype = np.dtype(codec_named(codec).dtype)
    raw = np.random.default_rng(seed).bytes(num_rows * HIDDEN * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(num_rows, HIDDEN)


def frames_of(
    hidden_TH: np.ndarray, *, codec: str = "f32", id: int = 1, first: int = 0, max_bytes: int = 64
) -> list[tensor_pb2.ActivationFrame]:
    requests = encode_frames(
        hidden_TH,
        link_id=LINK,
        micro_batch_id=id,
        first_sequence_number=first,
        codec=codec,
        max_frame_bytes=max_bytes,
    )
    return [request.frame for request in requests]


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def test_golden_bytes() -> None:
    hidden_TH = np.array([[0x3F80, 0xC000], [0x7FC1, 0x0001]], np.uint16)  # 1, -2, a NaN, denormal
    (request,) = encode_frames(
        hidden_TH, link_id=1, micro_batch_id=2, first_sequence_number=300, codec="bf16"
    )
    frame = request.frame
    frame.serialise_ns = 0
    assert frame.SerializeToString(deterministic=True).hex() == (
        "0801"  # link 1
        "1002"  # micro_batch_id 2
        "18ac02"  # sequence_number 300
        "2002"  # codec bf16
        "3002"  # 2 rows from row 0 (the default, not written)
        "3802"  # hidden_size 2
        "4208803f00c0c17f0100"  # data, little endian
        "49" + GOLDEN_CHECKSUM  # XXH3-64, fixed64
    )


GOLDEN_CHECKSUM = "ee64e198eee3d863"


@pytest.mark.parametrize("codec", ["f32", "bf16", "int8"])
def test_a_single_frame_is_taken_without_a_copy(codec: str) -> None:
    hidden_TH = activations(2, codec=codec)
    (frame,) = frames_of(hidden_TH, codec=codec)
    assembler = FrameAssembler(HIDDEN, codec, link_id=LINK)
    assert assembler.expect(1, 2) is None
    complete = assembler.add(frame)
    assert complete is not None
    assert complete.micro_batch_id == 1
    assert same_bits(complete.hidden_TH, hidden_TH)
    assert not complete.hidden_TH.flags.owndata
    assert assembler.num_open == 0


def test_frames_are_cut_at_rows_and_stay_below_the_limit() -> None:
    frames = frames_of(activations(7), max_bytes=2 * HIDDEN * 4 + 3, first=10)
    assert [frame.num_rows for frame in frames] == [2, 2, 2, 1]
    assert [frame.first_row for frame in frames] == [0, 2, 4, 6]
    assert [frame.sequence_number for frame in frames] == [10, 11, 12, 13]


def test_a_row_above_the_limit_gets_a_frame_of_its_own() -> None:
    assert len(frames_of(activations(3), max_bytes=1)) == 3


def test_the_array_may_be_overwritten_after_encoding() -> None:
    hidden_TH = activations(2).copy()
    before = hidden_TH.copy()
    (frame,) = frames_of(hidden_TH)
    hidden_TH[:] = 0
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(1, 2)
    complete = assembler.add(frame)
    assert complete is not None
    assert same_bits(complete.hidden_TH, before)


def test_frames_that_come_before_their_schedule_are_kept() -> None:
    hidden_TH = activations(5)
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    for frame in frames_of(hidden_TH, id=4):
        assert assembler.add(frame) is None
    complete = assembler.expect(4, 5)
    assert complete is not None
    assert same_bits(complete.hidden_TH, hidden_TH)
    assert complete.num_frames == len(frames_of(hidden_TH))


def test_micro_batches_may_interleave_on_a_link() -> None:
    big, small = activations(5, seed=1), activations(1, seed=2)
    frames = [*frames_of(big, id=1), *frames_of(small, id=2)]
    frames = [frames[0], frames[-1], *frames[1:-1]]
    for number, frame in enumerate(frames):
        frame.sequence_number = number
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(1, 5)
    assembler.expect(2, 1)
    done = [complete for frame in frames if (complete := assembler.add(frame))]
    assert [complete.micro_batch_id for complete in done] == [2, 1]
    assert same_bits(done[1].hidden_TH, big)


def test_what_comes_of_an_abandoned_micro_batch_is_dropped_and_counted() -> None:
    lost, wanted = activations(5, seed=1), activations(1, seed=2)
    first, second, *others = frames_of(lost, id=1)
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(1, 5)
    assembler.expect(2, 1)
    assembler.add(first)
    assembler.abandon(1)
    assert assembler.take_dropped() == 1
    for frame in (second, *others):
        assert assembler.add(frame) is None
    assert assembler.take_dropped() == 1 + len(others)
    (frame,) = frames_of(wanted, id=2, first=2 + len(others))
    complete = assembler.add(frame)
    assert complete is not None
    assert same_bits(complete.hidden_TH, wanted)
    assert assembler.num_open == assembler.take_dropped() == 0


def test_abandoned_micro_batches_that_never_come_are_forgotten_when_a_later_one_has() -> None:
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    for id in range(1, 5):
        assembler.expect(id, 1)
    for id in (1, 2, 4):
        assembler.abandon(id)
    (frame,) = frames_of(activations(1), id=3)
    assert assembler.add(frame) is not None
    assert assembler.num_open == 1  # the last one may come yet
    (late,) = frames_of(activations(1), id=2, first=1)
    with pytest.raises(ProtocolViolation, match="complete or was never scheduled"):
        assembler.add(late)


def test_only_what_is_expected_can_be_abandoned() -> None:
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    (frame,) = frames_of(activations(1), id=7)
    assembler.add(frame)
    for id in (6, 7):
        assembler.abandon(id)
    assert assembler.take_dropped() == 0
    assert assembler.expect(7, 1) is not None


@pytest.mark.parametrize("spoiled", [{"checksum": 0}, {"first_row": 3}, {"num_rows": 9}])
def test_frames_that_are_dropped_are_checked_like_others(spoiled: dict[str, int]) -> None:
    (frame,) = frames_of(activations(2))
    spoil(**spoiled)(frame)
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(1, 2)
    assembler.abandon(1)
    with pytest.raises(ProtocolViolation):
        assembler.add(frame)


def spoil(**fields: Any) -> Callable[[tensor_pb2.ActivationFrame], None]:
    def change(frame: tensor_pb2.ActivationFrame) -> None:
        for name, value in fields.items():
            setattr(frame, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (spoil(link_id=LINK + 1), ProtocolViolation),
        (spoil(micro_batch_id=0), ProtocolViolation),
        (spoil(sequence_number=1), ProtocolViolation),
        (spoil(codec=tensor_pb2.CODEC_BF16), MalformedMessage),
        (spoil(codec=tensor_pb2.CODEC_UNSPECIFIED), MalformedMessage),
        (spoil(codec=77), MalformedMessage),
        (spoil(first_row=1), ProtocolViolation),
        (spoil(num_rows=0, data=b""), MalformedMessage),
        (spoil(num_rows=2**32 - 1), MalformedMessage),
        (spoil(hidden_size=0), MalformedMessage),
        (spoil(hidden_size=2 * HIDDEN, num_rows=1), MalformedMessage),
        (spoil(data=b"x" * 47), MalformedMessage),
        (spoil(data=b"x" * 48), ChecksumMismatch),
        (spoil(checksum=0), ChecksumMismatch),
    ],
)
def test_a_frame_with_a_wrong_field_is_refused(
    change: Callable[[tensor_pb2.ActivationFrame], None], error: type[Exception]
) -> None:
    (frame,) = frames_of(activations(2))
    change(frame)
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(1, 2)
    with pytest.raises(error):
        assembler.add(frame)


def test_a_frame_above_the_limit_is_refused_though_it_contradicts_nothing() -> None:
    hidden_TH = activations(MAX_FRAME_BYTES // (4 * HIDDEN) + 1)
    (frame,) = frames_of(hidden_TH, max_bytes=2 * MAX_FRAME_BYTES)
    with pytest.raises(MalformedMessage, match="bytes"):
        FrameAssembler(HIDDEN, "f32", link_id=LINK).add(frame)


def test_a_duplicate_and_a_gap_are_refused() -> None:
    frames = frames_of(activations(5))
    for order in ([0, 0], [0, 2]):
        assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
        assembler.expect(1, 5)
        assembler.add(frames[order[0]])
        with pytest.raises(ProtocolViolation):
            assembler.add(frames[order[1]])


def test_more_rows_than_scheduled_are_refused_whichever_comes_first() -> None:
    (frame,) = frames_of(activations(2))
    expected_first = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    expected_first.expect(1, 1)
    with pytest.raises(ProtocolViolation, match="has 1 rows, 2 came"):
        expected_first.add(frame)
    frame_first = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    frame_first.add(frame)
    with pytest.raises(ProtocolViolation, match="has 1 rows, 2 came"):
        frame_first.expect(1, 1)


def test_ids_must_ascend_in_the_schedule() -> None:
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(5, 1)
    for id in (5, 4):
        with pytest.raises(ProtocolViolation):
            assembler.expect(id, 1)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(InvalidInput, match="f32 or bf16 or int8"):
        FrameAssembler(HIDDEN, "fp8", link_id=LINK)


@given(
    codec=st.sampled_from(["f32", "bf16", "int8"]),
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    max_bytes=st.integers(1, 400),
    early=st.booleans(),
)
def test_whatever_is_sent_comes_back_bit_for_bit(
    codec: str, rows: list[int], max_bytes: int, early: bool
) -> None:
    assembler = FrameAssembler(HIDDEN, codec, link_id=LINK)
    number = 0
    for id, num_rows in enumerate(rows):
        hidden_TH = activations(num_rows, codec=codec, seed=id)
        done = []
        if not early:
            done.append(assembler.expect(id, num_rows))
        for frame in frames_of(hidden_TH, codec=codec, id=id, first=number, max_bytes=max_bytes):
            wire = frame.SerializeToString()
            done.append(assembler.add(tensor_pb2.ActivationFrame.FromString(wire)))
            number += 1
        if early:
            done.append(assembler.expect(id, num_rows))
        assert done[:-1] == [None] * (len(done) - 1)
        assert done[-1] is not None
        assert same_bits(done[-1].hidden_TH, hidden_TH)
    assert assembler.num_open == 0


@given(position=st.integers(0, 10**6), flip=st.integers(1, 255), num_rows=st.integers(1, 4))
def test_a_changed_byte_never_passes_as_the_original(
    position: int, flip: int, num_rows: int
) -> None:
    hidden_TH = activations(num_rows)
    (frame,) = frames_of(hidden_TH, max_bytes=1000)
    frame.serialise_ns = 0  # says nothing about the activations
    wire = bytearray(frame.SerializeToString())
    wire[position % len(wire)] ^= flip
    try:
        changed = tensor_pb2.ActivationFrame.FromString(bytes(wire))
    except DecodeError:  # refused before it reaches the assembler
        return
    changed.serialise_ns = 0
    changed.DiscardUnknownFields()
    if changed == frame:
        return
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(1, num_rows)
    try:
        complete = assembler.add(changed)
    except ProtocolViolation:
        return
    # Kept for a micro-batch that nobody has scheduled.
    assert complete is None
    assert changed.micro_batch_id > 1


@given(data=st.data())
def test_frames_with_arbitrary_fields_never_crash(data: st.DataObject) -> None:
    assembler = FrameAssembler(HIDDEN, "f32", link_id=LINK)
    assembler.expect(1, 3)
    small = st.integers(0, 8)
    (frame,) = frames_of(activations(data.draw(st.integers(1, 4))), max_bytes=1000)
    for name in ("link_id", "micro_batch_id", "sequence_number", "codec", "first_row"):
        if data.draw(st.booleans()):
            setattr(frame, name, data.draw(small | st.integers(0, 2**31 - 1)))
    for name in ("num_rows", "hidden_size", "checksum"):
        if data.draw(st.booleans()):
            setattr(frame, name, data.draw(small | st.integers(0, 2**32 - 1)))
    try:
        complete = assembler.add(frame)
    except ProtocolViolation:
        return
    assert complete is None or complete.hidden_TH.shape == (3, HIDDEN)
