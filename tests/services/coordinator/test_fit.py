"""What the coordinator reads off a stage's manifest."""

from __future__ import annotations

import pytest
from penstock.v1 import stage_pb2

from services.coordinator.fit import replica_facts


@pytest.mark.parametrize(
    ("threads", "threads_alone", "gain"),
    [(1, 2, 2.0), (6, 8, 8 / 6), (2, 2, 1.0), (4, 1, 1.0), (0, 0, 1.0)],
)
def test_what_a_stage_gains_alone_is_how_many_more_threads_it_has_then(
    threads: int, threads_alone: int, gain: float
) -> None:
    ready = stage_pb2.StageReady(
        num_kv_blocks=8, max_rows=16, threads=threads, threads_alone=threads_alone
    )
    assert replica_facts(ready, is_spare=False).gain_alone == pytest.approx(gain)
