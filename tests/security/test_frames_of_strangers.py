"""Tensors from other nodes: bytes with a shape beside them, and neither is believed.

CVE-2024-42477, -42478 and -42479 (llama.cpp's RPC: type, offset and pointer taken from the wire),
CVE-2026-34159 (its shapes), CVE-2025-62164 (vLLM: shape and indices of a client's tensor),
CVE-2025-32444 (pickles between nodes), CVE-2026-41523 (checks by assert, gone under -O).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import MalformedMessage, ProtocolViolation
from core.wire.frames import FrameAssembler
from services.stage.orders import OrderLimits, decode_micro_batch

ROOT = Path(__file__).parents[2]
HIDDEN_SIZE = 8
NUM_ROWS = 2
LIMITS = OrderLimits(max_rows=16, vocab_size=100, context_length=64, is_first=True, is_last=False)
# What `pickle.dumps` makes of an object whose __reduce__ is (os.system, ("touch /tmp/owned",)).
PICKLE = b"\x80\x04cposix\nsystem\nX\x10\x00\x00\x00touch /tmp/owned\x85R."


def frame(**fields: Any) -> tensor_pb2.ActivationFrame:
    """A right frame but for some fields; its checksum is that of its data."""
    data = fields.get("data", np.ones((NUM_ROWS, HIDDEN_SIZE), "<f4").tobytes())
    right: dict[str, Any] = {
        "link_id": 1,
        "micro_batch_id": 1,
        "codec": tensor_pb2.CODEC_F32,
        "num_rows": NUM_ROWS,
        "hidden_size": HIDDEN_SIZE,
        "data": data,
        "checksum": xxhash.xxh3_64_intdigest(data),
    }
    return tensor_pb2.ActivationFrame(**right | fields)


def take(wrong: tensor_pb2.ActivationFrame) -> None:
    assembler = FrameAssembler(HIDDEN_SIZE, "f32", link_id=1)
    assembler.expect(1, NUM_ROWS)
    assembler.add(wrong)


def test_the_frame_that_the_others_here_spoil_is_right() -> None:
    take(frame())


def test_cve_2025_32444_a_pickle_in_place_of_a_tensor_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="size of data"):
        take(frame(data=PICKLE))


def test_cve_2025_32444_a_pickle_of_a_tensors_size_is_numbers_and_nothing_else() -> None:
    padded = PICKLE.ljust(NUM_ROWS * HIDDEN_SIZE * 4, b".")
    assembler = FrameAssembler(HIDDEN_SIZE, "f32", link_id=1)
    assembler.expect(1, NUM_ROWS)
    complete = assembler.add(frame(data=padded))
    assert complete is not None
    assert complete.hidden_TH.tobytes() == padded
    assert complete.hidden_TH.dtype == np.dtype("<f4")


@pytest.mark.parametrize(
    "claim",
    [
        {"num_rows": 2**32 - 1},
        {"num_rows": 2**31, "hidden_size": 2},
        {"hidden_size": 0},
        {"hidden_size": 2**32 - 1},
        # Their product wraps around to the size of the data in 32 bits.
        {"num_rows": 2**29, "hidden_size": 2**29},
        {"num_rows": 2**30 + NUM_ROWS},
        {"num_rows": 0, "data": b""},
    ],
    ids=str,
)
def test_cve_2025_62164_and_cve_2026_34159_a_claimed_shape_is_never_believed(
    claim: dict[str, Any],
) -> None:
    with pytest.raises(MalformedMessage):
        take(frame(**claim))


@pytest.mark.parametrize("codec", [0, 2, 3, 99, -1, 2**31 - 1])
def test_cve_2024_42478_an_element_type_that_is_not_the_deployments_is_refused(codec: int) -> None:
    with pytest.raises(MalformedMessage, match="codec"):
        take(frame(codec=codec))


@pytest.mark.parametrize("first_row", [1, 2, 2**31, 2**32 - 1])
def test_cve_2024_42479_rows_cannot_be_written_where_the_sender_likes(first_row: int) -> None:
    with pytest.raises(ProtocolViolation):
        take(frame(first_row=first_row))


@pytest.mark.parametrize("field", ["slots", "first_positions", "num_rows", "num_samples"])
@pytest.mark.parametrize("number", [2**31, 2**32 - 1])
def test_cve_2024_42477_an_index_beyond_31_bits_is_refused(field: str, number: int) -> None:
    order = stage_pb2.MicroBatch(
        id=1, slots=[0], first_positions=[0], num_rows=[1], num_samples=[0], token_ids=[1]
    )
    getattr(order, field)[0] = number
    with pytest.raises(MalformedMessage):
        decode_micro_batch(order, LIMITS)


def test_cve_2026_41523_without_asserts_the_same_is_refused() -> None:
    program = (
        "from tests.security.test_frames_of_strangers import *\n"
        "wrong = ({'data': PICKLE}, {'num_rows': 2**32 - 1}, {'codec': 2}, {'first_row': 1})\n"
        "for one in wrong:\n"
        "    try:\n"
        "        take(frame(**one))\n"
        "        print('taken')\n"
        "    except ProtocolViolation:\n"
        "        print('refused', __debug__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["refused False"] * 4, done.stderr
