"""Frames of blocks of int8: exact bytes, exact sizes, and no scale that is no scale."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from penstock.v1 import tensor_pb2

from core.errors import MalformedMessage
from core.kernels.blocks.reference import encode_rows
from core.wire.codecs import codec_named
from core.wire.frames import FrameAssembler, encode_frames

LINK = 3
HIDDEN = 35  # a block of 32, and one of 3
GOLDEN_CHECKSUM = "b94dcb854ac30170"


def frame_of(rows_TH: npt.NDArray[np.float32]) -> tensor_pb2.ActivationFrame:
    (request,) = encode_frames(
        encode_rows(rows_TH), link_id=LINK, micro_batch_id=1, first_sequence_number=0, codec="int8"
    )
    return request.frame


def take(frame: tensor_pb2.ActivationFrame) -> npt.NDArray[np.uint8]:
    assembler = FrameAssembler(HIDDEN, "int8", link_id=LINK)
    assembler.expect(1, frame.num_rows)
    complete = assembler.add(frame)
    assert complete is not None
    return complete.hidden_TH


def resealed(
    frame: tensor_pb2.ActivationFrame, data: bytes, **fields: int
) -> tensor_pb2.ActivationFrame:
    """The frame with other data, and a checksum that fits."""
    (donor,) = encode_frames(
        np.frombuffer(data, np.uint8).reshape(1, -1),
        link_id=LINK,
        micro_batch_id=1,
        first_sequence_number=0,
        codec="int8",
    )
    frame.data, frame.checksum = data, donor.frame.checksum
    for name, value in fields.items():
        setattr(frame, name, value)
    return frame


def test_golden_bytes() -> None:
    rows_TH = np.zeros((1, HIDDEN), np.float32)
    rows_TH[0, :3] = 127, -63.4, 0.5
    rows_TH[0, 32:] = np.nan, 1, 2
    frame = frame_of(rows_TH)
    frame.serialise_ns = 0
    assert frame.SerializeToString(deterministic=True).hex() == (
        "0803"  # link 3
        "1001"  # micro_batch_id 1
        "2003"  # codec int8
        "3001"  # 1 row
        "3823"  # hidden_size 35
        "4227"  # 39 bytes
        "7fc100" + 29 * "00"  # 127, -63 and 0 (ties to even), all times 1
        + "808080"  # a block that is not finite
        "803f"  # 1, a bfloat16
        "0000"
        "49" + GOLDEN_CHECKSUM  # XXH3-64, fixed64
    )  # fmt: skip


def test_rows_come_back_to_the_bit() -> None:
    rows_TH = np.random.default_rng(1).normal(size=(5, HIDDEN)).astype(np.float32)
    np.testing.assert_array_equal(take(frame_of(rows_TH)), encode_rows(rows_TH))


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x8000, 0xBF80])
def test_a_scale_that_is_negative_or_not_finite_is_refused(bits: int, block: int) -> None:
    frame = frame_of(np.ones((2, HIDDEN), np.float32))
    data = bytearray(frame.data)
    where = len(data) // 2 + HIDDEN + 2 * block
    data[where : where + 2] = bits.to_bytes(2, "little")
    with pytest.raises(MalformedMessage, match="scale"):
        take(resealed(frame, bytes(data)))


@pytest.mark.parametrize("size", [HIDDEN, HIDDEN + 2, HIDDEN + 3, HIDDEN + 5, 4 * HIDDEN, 0])
def test_rows_of_another_size_are_refused(size: int) -> None:
    frame = frame_of(np.ones((1, HIDDEN), np.float32))
    frame.data = bytes(size)
    with pytest.raises(MalformedMessage, match="size of data"):
        take(frame)


@pytest.mark.parametrize("codec", ["f32", "bf16"])
def test_a_link_with_another_codec_is_refused(codec: str) -> None:
    assembler = FrameAssembler(HIDDEN, codec, link_id=LINK)
    with pytest.raises(MalformedMessage, match="codec"):
        assembler.add(frame_of(np.ones((1, HIDDEN), np.float32)))


def test_a_row_of_the_models_sizes_takes_little_more_than_a_byte_an_element() -> None:
    codec = codec_named("int8")
    sizes = {size: codec.row_bytes(size) for size in (576, 896, 2048)}
    assert sizes == {576: 612, 896: 952, 2048: 2176}
