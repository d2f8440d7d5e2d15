"""What the coordinator knows of its stages, for gateways, people and dashboards."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.v1 import coordinator_pb2, generation_pb2, stage_pb2

from services.coordinator.messages import seconds

WINDOW_S = 10.0
# Durations of a stage's reports, and the shares of a stage's state that they become.
_SHARES = {
    "busy": "busy_fraction",
    "stolen": "stolen_fraction",
    "starved": "starved_fraction",
    "starved_for_schedule": "starved_for_schedule",
    "starved_for_upstream": "starved_for_upstream",
    "starved_by_wire": "starved_by_wire",
    "starved_by_serialising": "starved_by_serialising",
}


class Window:
    """Sums of several quantities over the last ten seconds."""

    def __init__(self, num_quantities: int) -> None:
        self._entries: deque[tuple[float, tuple[float, ...]]] = deque()
        self._sums = [0.0] * num_quantities

    def add(self, now_s: float, *values: float) -> None:
        self._entries.append((now_s, values))
        for index, value in enumerate(values):
            self._sums[index] += value
        self._forget(now_s)

    def sums(self, now_s: float) -> list[float]:
        self._forget(now_s)
        return list(self._sums)

    def _forget(self, now_s: float) -> None:
        while self._entries and self._entries[0][0] < now_s - WINDOW_S:
            for index, value in enumerate(self._entries.popleft()[1]):
                self._sums[index] -= value


@dataclass
class StageView:
    """One stage: what it said when it opened, and its reports."""

    address: str
    ready: stage_pb2.StageReady | None = None  # what it last said, kept when it is gone
    is_ready: bool = False
    problem: str = "starting"
    window: Window = field(default_factory=lambda: Window(1 + len(_SHARES)))  # rows, seconds

    def add(self, report: stage_pb2.StageReport, now_s: float) -> None:
        durations = (seconds(getattr(report, duration)) for duration in _SHARES)
        self.window.add(now_s, sum(report.batch_rows), *durations)

    def write_rates(
        self, state: coordinator_pb2.StageState, *, now_s: float, over_s: float
    ) -> None:
        """Fills in the rates and shares of the last `over_s` seconds."""
        rows, *durations = self.window.sums(now_s)
        state.rows_per_second = max(rows / over_s, 0.0)
        for field_name, duration_s in zip(_SHARES.values(), durations, strict=True):
            setattr(state, field_name, min(max(duration_s / over_s, 0.0), 1.0))


class MeshView:
    """All stages, and the model they make."""

    def __init__(self, addresses: Sequence[str], now_s: float) -> None:
        self.stages = [StageView(address) for address in addresses]
        self.is_ready = False
        self.started_s = now_s
        self.return_wire_s = 0.0  # of sampled tokens, since the coordinator started
        self._ready_since_s = now_s

    @property
    def model_name(self) -> str:
        """Empty until the pipeline has been ready once."""
        ready = self.stages[0].ready
        return ready.model if ready is not None else ""

    @property
    def vocab_size(self) -> int:
        ready = self.stages[0].ready
        return ready.vocab_size if ready is not None else 0

    def stage_ready(self, stage_index: int, ready: stage_pb2.StageReady) -> None:
        stage = self.stages[stage_index]
        stage.ready, stage.is_ready, stage.problem = ready, True, ""

    def pipeline_ready(self, now_s: float) -> None:
        self.is_ready = True
        self._ready_since_s = now_s

    def pipeline_lost(self, stage_index: int | None, reason: str) -> None:
        """All stages have to be opened again; the one to blame says why."""
        self.is_ready = False
        for index, stage in enumerate(self.stages):
            stage.is_ready = False
            stage.problem = reason if stage_index in (index, None) else "waits for other stages"

    def model(self) -> generation_pb2.Model:
        ready = self.stages[0].ready
        if ready is None:
            return generation_pb2.Model()
        return generation_pb2.Model(
            name=ready.model,
            context_length=ready.context_length,
            num_stages=len(self.stages),
            number_format=ready.number_format,
            vocab_size=ready.vocab_size,
            ready=self.is_ready,
        )

    def state(self) -> coordinator_pb2.MeshState:
        """What gateways must know."""
        ready = self.stages[0].ready
        return coordinator_pb2.MeshState(
            model=self.model(),
            stages_ready=[stage.is_ready for stage in self.stages],
            eos_token_ids=ready.eos_token_ids if ready is not None else (),
        )

    def stage_state(
        self, index: int, *, now_s: float, kv_blocks_used: int
    ) -> coordinator_pb2.StageState:
        """One stage in full; its shares are of the last ten seconds, or since it is ready."""
        stage = self.stages[index]
        state = coordinator_pb2.StageState(
            index=index, address=stage.address, ready=stage.is_ready, problem=stage.problem
        )
        if stage.ready is not None:
            state.first_layer = stage.ready.first_layer
            state.end_layer = stage.ready.end_layer
            state.weights_bytes = stage.ready.weights_bytes
            state.bytes_read = stage.ready.bytes_read
            state.kv_blocks_total = stage.ready.num_kv_blocks
            state.load_duration.CopyFrom(stage.ready.load_duration)
        state.kv_blocks_used = kv_blocks_used
        stage.write_rates(state, now_s=now_s, over_s=self.window_s(now_s))
        return state

    def window_s(self, now_s: float) -> float:
        """Seconds that rates are averaged over."""
        return min(max(now_s - self._ready_since_s, 0.1), WINDOW_S)
