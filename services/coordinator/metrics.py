"""Metrics of the coordinator. Everything is read when asked for, so that tokens cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from core import telemetry as names
from services.common.telemetry import Labels, Telemetry
from services.coordinator.conductor import Conductor
from services.coordinator.replica_link import ReplicaLink


def register_metrics(telemetry: Telemetry, conductor: Conductor) -> None:
    """Reports scheduler and replicas on the process's meter."""
    scheduler, mesh = conductor.scheduler, conductor.mesh

    def model() -> dict[str, str | int]:
        return {names.MODEL: mesh.model_name}

    def one(read: Callable[[], float]) -> Callable[[], Iterable[tuple[float, Labels]]]:
        return lambda: [(read(), model())]

    def by_replica(
        read: Callable[[ReplicaLink], float],
    ) -> Callable[[], Iterable[tuple[float, Labels]]]:
        return lambda: [
            (
                read(link),
                {
                    **model(),
                    names.STAGE: link.place.stage_index,
                    names.REPLICA: link.place.number,
                },
            )
            for link in conductor.replicas.links
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
    observe(names.SEQUENCES_MOVED, one(lambda: scheduler.num_failovers))
    observe(names.POSITIONS_RESTORED, one(lambda: scheduler.num_restored_tokens))
    observe(names.KV_BLOCKS_USED, by_replica(conductor.num_kv_blocks_used))
    observe(
        names.KV_BLOCKS_TOTAL,
        by_replica(lambda link: link.ready.num_kv_blocks if link.ready else 0),
    )
