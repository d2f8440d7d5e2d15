"""Orders become what the engine takes."""

from __future__ import annotations

import pytest
from penstock.v1 import stage_pb2

from services.stage.orders import OrderLimits, decode_micro_batch

LIMITS = OrderLimits(max_rows=8, vocab_size=16, context_length=32, is_first=True, is_last=True)


@pytest.mark.parametrize("is_alone", [False, True])
def test_whether_a_micro_batch_is_alone_reaches_the_engine(is_alone: bool) -> None:
    order = stage_pb2.MicroBatch(
        id=1, slots=[0], first_positions=[0], num_rows=[1], num_samples=[1], token_ids=[3],
        is_alone=is_alone,
    )  # fmt: skip
    assert decode_micro_batch(order, LIMITS).is_alone is is_alone
