"""Metrics of the coordinator. Everything is read when asked for, so that tokens cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from core import telemetry as names
from core.pipeline.scheduler import Scheduler
from services.common.telemetry import Labels, Telemetry
from services.coordinator.mesh import MeshView, StageView


def register_metrics(telemetry: Telemetry, scheduler: Scheduler, mesh: MeshView) -> None:
    """Reports scheduler and stages on the process's meter."""

    def model() -> dict[str, str | int]:
        return {names.MODEL: mesh.model_name}

    def one(read: Callable[[], float]) -> Callable[[], Iterable[tuple[float, Labels]]]:
        return lambda: [(read(), model())]

    def by_stage(
        read: Callable[[StageView], float],
    ) -> Callable[[], Iterable[tuple[float, Labels]]]:
        return lambda: [
            (read(stage), {**model(), names.STAGE: index})
            for index, stage in enumerate(mesh.stages)
        ]

    def kv_used() -> Iterable[tuple[float, Labels]]:
        return [
            (used, {**model(), names.STAGE: index})
            for index, used in enumerate(scheduler.kv_blocks_used_S)
        ]

    def tokens() -> Iterable[tuple[float, Labels]]:
        return [
            (scheduler.num_prompt_tokens, {**model(), names.TOKEN_TYPE: "input"}),
            (scheduler.num_tokens, {**model(), names.TOKEN_TYPE: "output"}),
        ]

    observe = telemetry.observe_many
    observe(names.REQUESTS_WAITING, one(lambda: scheduler.num_waiting))
    observe(names.REQUESTS_RUNNING, one(lambda: scheduler.num_running))
    observe(names.MICRO_BATCHES_IN_FLIGHT, one(lambda: scheduler.num_in_flight))
    observe(names.PREEMPTIONS, one(lambda: scheduler.num_preemptions))
    observe(names.TOKENS, tokens)
    observe(names.RETURN_WIRE, one(lambda: mesh.return_wire_s))
    observe(names.CACHED_TOKENS, one(lambda: scheduler.num_cached_tokens))
    observe(names.TOKENS_GUESSED, one(lambda: scheduler.speculation.num_drafted))
    observe(names.TOKENS_GUESSED_RIGHT, one(lambda: scheduler.speculation.num_accepted))
    observe(names.KV_BLOCKS_USED, kv_used)
    observe(names.KV_BLOCKS_TOTAL, by_stage(lambda s: s.ready.num_kv_blocks if s.ready else 0))
