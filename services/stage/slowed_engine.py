"""An engine that takes longer than it needs: a slow node, or one that hangs, to try what others do.

Letters: T rows, H hidden size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from math import inf
from pathlib import Path

from core.pipeline.batch import MicroBatch, SequenceUpdates
from core.wire.codecs import Activations
from services.stage.job import StageEngine, StepResult


def slowed(engine: StageEngine, *, by: float, file: Path | None = None) -> StageEngine:
    """Returns an engine whose steps take `by` times as long; the engine itself where that is 1.

    As long as `file` is there, the factor in it counts instead; inf: the step never ends.
    """
    if file is not None:
        return SlowedEngine(engine, factor=lambda: _factor_in(file, otherwise=by))
    return engine if by == 1.0 else SlowedEngine(engine, factor=lambda: by)


def _factor_in(file: Path, *, otherwise: float) -> float:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # not there, or being written
        return otherwise


def _sleep(seconds: float) -> None:
    threading.Event().wait(None if seconds == inf else seconds)


class SlowedEngine:
    """Waits after each step, as if others had the core: reports show the wait as stolen."""

    def __init__(
        self,
        engine: StageEngine,
        *,
        factor: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = _sleep,
    ) -> None:
        """`factor` is asked before each step."""
        self._engine = engine
        self.factor = factor
        self._clock = clock
        self._sleep = sleep

    def apply(self, updates: SequenceUpdates) -> None:
        self._engine.apply(updates)

    def prepare(self, batch: MicroBatch) -> None:
        self._engine.prepare(batch)

    def step(self, batch: MicroBatch, hidden_TH: Activations | None) -> StepResult:
        factor, started_s = self.factor(), self._clock()
        result = self._engine.step(batch, hidden_TH)
        if factor > 1.0:
            self._sleep((factor - 1.0) * (self._clock() - started_s))
        return result
