"""An engine that takes longer than it needs: a slow node, to try what others do then.

Letters: T rows, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from core.pipeline.batch import MicroBatch, SequenceUpdates
from core.wire.codecs import Activations
from services.stage.job import StageEngine, StepResult


def slowed(engine: StageEngine, *, by: float) -> StageEngine:
    """Returns an engine whose steps take `by` times as long; the engine itself where that is 1."""
    return engine if by == 1.0 else SlowedEngine(engine, by=by)


class SlowedEngine:
    """Waits after each step, as if others had the core: reports show the wait as stolen."""

    def __init__(
        self,
        engine: StageEngine,
        *,
        by: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._by = by
        self._clock = clock
        self._sleep = sleep

    def apply(self, updates: SequenceUpdates) -> None:
        self._engine.apply(updates)

    def step(self, batch: MicroBatch, hidden_TH: Activations | None) -> StepResult:
        started_s = self._clock()
        result = self._engine.step(batch, hidden_TH)
        self._sleep((self._by - 1) * (self._clock() - started_s))
        return result
