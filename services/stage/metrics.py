"""A stage's metrics: sums that are kept anyway, read when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from penstock.v1 import stage_pb2

from core import telemetry as names
from core.telemetry import Metric
from services.common.telemetry import Labels, Telemetry
from services.stage.timings import Totals
from services.stage.weight_watch import WeightWatch


def register_metrics(
    telemetry: Telemetry,
    *,
    manifest: stage_pb2.StageReady,
    totals: Totals,
    watch: WeightWatch,
    stage_index: Callable[[], int | None],
    kv_blocks_used: Callable[[], int],
) -> None:
    """Registers all metrics of a stage; they appear once `stage_index()` is known."""
    sources: list[tuple[Metric, Callable[[], float]]] = [
        (names.STAGE_BUSY, lambda: totals.busy_ns / 1e9),
        (names.STAGE_STOLEN, lambda: totals.stolen_ns / 1e9),
        (names.STAGE_WIRE, lambda: totals.wire_ns / 1e9),
        (names.STAGE_SERIALISE, lambda: totals.serialise_ns / 1e9),
        (names.STAGE_ROWS, lambda: totals.rows),
        (names.STAGE_MICRO_BATCHES, lambda: totals.micro_batches),
        (names.STAGE_WEIGHTS, lambda: manifest.weights_bytes),
        (names.WEIGHTS_CHECKED, lambda: watch.num_bytes_checked),
        (names.WEIGHTS_DAMAGED, lambda: int(bool(watch.damaged))),
        (names.KV_BLOCKS_USED, kv_blocks_used),
        (names.KV_BLOCKS_TOTAL, lambda: manifest.num_kv_blocks),
    ]
    for metric, read in sources:
        telemetry.observe_many(metric, _labelled(read, manifest.model, stage_index))
    telemetry.observe_many(names.STAGE_STARVED, _by_cause(totals, manifest.model, stage_index))


def _by_cause(
    totals: Totals, model: str, stage_index: Callable[[], int | None]
) -> Callable[[], Iterable[tuple[float, Labels]]]:
    def by_cause() -> Iterable[tuple[float, Labels]]:
        index = stage_index()
        if index is None:
            return []
        return [
            (nanoseconds / 1e9, {names.MODEL: model, names.STAGE: index, names.CAUSE: cause})
            for cause, nanoseconds in (
                ("schedule", totals.starved.schedule_ns),
                ("upstream", totals.starved.upstream_ns),
                ("wire", totals.starved.wire_ns),
                ("serialise", totals.starved.serialise_ns),
            )
        ]

    return by_cause


def _labelled(
    read: Callable[[], float], model: str, stage_index: Callable[[], int | None]
) -> Callable[[], Iterable[tuple[float, Labels]]]:
    def labelled() -> Iterable[tuple[float, Labels]]:
        index = stage_index()
        return [] if index is None else [(read(), {names.MODEL: model, names.STAGE: index})]

    return labelled
