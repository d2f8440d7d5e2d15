"""What the coordinator knows of its replicas, for gateways, people and dashboards."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from penstock.v1 import coordinator_pb2, generation_pb2, stage_pb2

from services.common.durations import seconds
from services.coordinator.replica_link import Incarnation, ReplicaLink
from services.coordinator.replicas import Replicas

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
class Reports:
    """What an incarnation has reported of the last ten seconds."""

    since_s: float
    window: Window = field(default_factory=lambda: Window(1 + len(_SHARES)))  # rows, seconds

    def add(self, report: stage_pb2.StageReport, now_s: float) -> None:
        durations = (seconds(getattr(report, duration)) for duration in _SHARES)
        self.window.add(now_s, sum(report.batch_rows), *durations)

    def write(self, state: coordinator_pb2.StageState, now_s: float) -> None:
        """Fills in rates and shares of the last ten seconds, or since it is open."""
        over_s = window_s(self.since_s, now_s)
        rows, *durations = self.window.sums(now_s)
        state.rows_per_second = max(rows / over_s, 0.0)
        for field_name, duration_s in zip(_SHARES.values(), durations, strict=True):
            setattr(state, field_name, min(max(duration_s / over_s, 0.0), 1.0))


class MeshView:
    """All replicas, and the model they make."""

    def __init__(self, replicas: Replicas, now_s: float) -> None:
        self.replicas = replicas
        self.is_waiting = True  # until a gateway has it take the stages over
        self.is_ready = False  # whether a request would be served now
        self.started_s = now_s
        self.return_wire_s = 0.0  # of sampled tokens, since the coordinator started
        self._reports: dict[int, Reports] = {}  # by replica id

    @property
    def model_name(self) -> str:
        """Empty until a replica has been open."""
        manifest = self.replicas.manifest
        return manifest.model if manifest is not None else ""

    def add_report(self, replica: Incarnation, report: stage_pb2.StageReport, now_s: float) -> None:
        reports = self._reports.get(replica.replica_id)
        if reports is None:
            self._forget_the_lost()
            reports = self._reports[replica.replica_id] = Reports(now_s)
        reports.add(report, now_s)

    def _forget_the_lost(self) -> None:
        open_ids = {link.incarnation.replica_id for link in self.replicas.links if link.incarnation}
        for replica_id in self._reports.keys() - open_ids:
            del self._reports[replica_id]

    def model(self) -> generation_pb2.Model:
        manifest = self.replicas.manifest
        if manifest is None:
            return generation_pb2.Model()
        return generation_pb2.Model(
            name=manifest.model,
            context_length=manifest.context_length,
            num_stages=self.replicas.num_stages,
            number_format=manifest.number_format,
            vocab_size=manifest.vocab_size,
            ready=self.is_ready,
        )

    def stages_ready(self) -> list[bool]:
        """Of each stage, whether it can take part."""
        return [self.replicas.is_stage_ready(index) for index in range(self.replicas.num_stages)]

    def serving(self) -> dict[str, bool]:
        """The names of the health service, and whether they are served now."""
        serving = {"": self.is_ready}
        if model := self.model_name:
            serving[model] = self.is_ready
            for index, is_ready in enumerate(self.stages_ready()):
                serving[f"{model}/stage/{index}"] = is_ready
        return serving

    def state(self) -> coordinator_pb2.MeshState:
        """What gateways must know."""
        manifest = self.replicas.manifest
        return coordinator_pb2.MeshState(
            model=self.model(),
            stages_ready=self.stages_ready(),
            eos_token_ids=manifest.eos_token_ids if manifest is not None else (),
            waiting=self.is_waiting,
        )

    def replica_state(self, link: ReplicaLink, now_s: float) -> coordinator_pb2.StageState:
        """One replica in full, but for what the scheduler knows of it."""
        place, ready = link.place, link.ready
        state = coordinator_pb2.StageState(
            index=place.stage_index,
            replica=place.number,
            address=place.address,
            spare=place.is_spare,
            draining=link.is_draining,
            problem=link.problem,
        )
        if link.incarnation is not None:
            state.ready = self.replicas.is_connected(link.incarnation)
            state.problem = "" if state.ready else "not connected with its neighbours"
            state.passed_over = self.replicas.is_passed_over(link.incarnation)
        if ready is not None:
            state.first_layer = ready.first_layer
            state.end_layer = ready.end_layer
            state.weights_bytes = ready.weights_bytes
            state.bytes_read = ready.bytes_read
            state.kv_blocks_total = ready.num_kv_blocks
            state.load_duration.CopyFrom(ready.load_duration)
            state.weights_digest = ready.weights_digest
        if link.incarnation is not None:
            reports = self._reports.get(link.incarnation.replica_id)
            if reports is not None:
                reports.write(state, now_s)
        return state


def window_s(since_s: float, now_s: float) -> float:
    """Seconds that rates are averaged over."""
    return min(max(now_s - since_s, 0.1), WINDOW_S)
