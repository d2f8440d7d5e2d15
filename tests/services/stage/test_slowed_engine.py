"""An engine that takes longer than it needs."""

from __future__ import annotations

from math import inf
from pathlib import Path

import numpy as np

from core.pipeline.batch import MicroBatch, SequenceStart, SequenceUpdates
from services.stage.slowed_engine import SlowedEngine, slowed
from tests.support.counting_engine import CountingEngine

ONE = np.ones(1, np.int32)
BATCH = MicroBatch(
    id=1,
    slots_R=ONE,
    first_positions_R=ONE,
    num_rows_R=ONE,
    num_samples_R=ONE,
    token_ids_T=ONE,
)


def test_a_step_is_followed_by_a_wait_in_proportion() -> None:
    engine = CountingEngine(is_first=True, is_last=True)
    times, waits = iter([10.0, 12.0]), list[float]()
    slow = SlowedEngine(engine, factor=lambda: 2.5, clock=lambda: next(times), sleep=waits.append)
    slow.apply(SequenceUpdates(starts=(SequenceStart(slot=1, request_id=1),)))
    result = slow.step(BATCH, None)
    assert result.sampled is not None
    assert result.sampled.token_ids == (1 + 1 + 1,)
    assert waits == [3.0]


def test_an_engine_that_is_not_slowed_is_left_as_it_is() -> None:
    engine = CountingEngine(is_first=True, is_last=True)
    assert slowed(engine, by=1.0) is engine


def test_a_file_changes_the_factor_while_it_is_there(tmp_path: Path) -> None:
    file, times, waits = tmp_path / "pace", iter(range(100)), list[float]()
    engine = slowed(CountingEngine(is_first=True, is_last=True), by=2.0, file=file)
    assert isinstance(engine, SlowedEngine)
    slow = SlowedEngine(
        CountingEngine(is_first=True, is_last=True),
        factor=engine.factor,
        clock=lambda: float(next(times)),
        sleep=waits.append,
    )
    slow.apply(SequenceUpdates(starts=(SequenceStart(slot=1, request_id=1),)))
    slow.step(BATCH, None)
    file.write_text("11")
    slow.step(BATCH, None)
    file.write_text("inf")
    slow.step(BATCH, None)
    assert waits == [1.0, 10.0, inf]
