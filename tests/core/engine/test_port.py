"""What goes out of one stage in a lossy codec is what the next one computes with."""

from __future__ import annotations

import numpy as np
import pytest

from core.engine.port import ActivationPort, host_port, make_port
from core.errors import ProtocolViolation
from core.kernels.arithmetic import Arithmetic
from core.kernels.blocks.reference import decode_rows, encode_rows

HIDDEN, PADDED, ROWS = 70, 128, 3
BF16 = Arithmetic("bf16", "portable")


def stream(width: int) -> np.ndarray:
    rows_TG = np.zeros((4, width), np.float32)
    rows_TG[:, :HIDDEN] = np.random.default_rng(1).normal(size=(4, HIDDEN))
    return rows_TG


def ports(hidden_TG: np.ndarray) -> ActivationPort:
    """Of a stage on the CPU, whose rows are padded, or of the host's copy of a device's."""
    if hidden_TG.shape[1] == HIDDEN:
        return host_port("int8", hidden_TG)
    return make_port("int8", BF16, hidden_TG=hidden_TG, hidden_size=HIDDEN)


@pytest.mark.parametrize("sender", [HIDDEN, PADDED])
@pytest.mark.parametrize("receiver", [HIDDEN, PADDED])
def test_rows_arrive_as_the_reference_says(sender: int, receiver: int) -> None:
    sent_TG, received_TG = stream(sender), np.zeros((4, receiver), np.float32)
    rows_TW = ports(sent_TG).give(ROWS)
    np.testing.assert_array_equal(rows_TW, encode_rows(sent_TG[:ROWS, :HIDDEN]))
    ports(received_TG).take(rows_TW.copy(), num_rows=ROWS)
    np.testing.assert_array_equal(received_TG[:ROWS, :HIDDEN], decode_rows(rows_TW, size=HIDDEN))
    assert not received_TG[ROWS:].any()
    assert not received_TG[:, HIDDEN:].any()


def test_rows_of_another_codec_or_size_are_refused() -> None:
    port = ports(stream(PADDED))
    rows_TW = port.give(ROWS)
    for wrong in (None, rows_TW[:2], rows_TW[:, :-1], rows_TW.view(np.int8), stream(HIDDEN)[:3]):
        with pytest.raises(ProtocolViolation, match="expected"):
            port.take(wrong, num_rows=ROWS)
