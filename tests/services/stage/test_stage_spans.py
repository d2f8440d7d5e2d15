"""Spans of a stage: one for each traced sequence, however many tokens; none for others."""

from __future__ import annotations

from pathlib import Path

import pytest
from penstock.v1 import stage_pb2

from services.common.telemetry import start_telemetry
from tests.support.otlp_receiver import otlp_receiver
from tests.support.stages import HandDrivenCoordinator, micro_batch, running_chain, start

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


async def test_a_traced_sequence_leaves_one_span_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = start(0, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
    with otlp_receiver(tmp_path) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        telemetry = start_telemetry("penstock-stage", metrics_port=None)
        async with (
            running_chain(2, telemetry=telemetry) as stages,
            HandDrivenCoordinator(stages) as coordinator,
        ):
            await coordinator.open()
            await coordinator.run(micro_batch(1, {0: [1, 2, 3], 1: [4]}, starts=[traced, start(1)]))
            await coordinator.run(micro_batch(2, {0: [9], 1: [9]}, first_position=3))
            for _ in range(2):
                await coordinator.sampled()
            for control in coordinator.controls:
                await control.send(updates=stage_pb2.SequenceUpdates(ended_slots=[0]))
            await coordinator.run(micro_batch(3, {1: [9]}, first_position=4))
            await coordinator.sampled()
        telemetry.shutdown()
        spans = receiver.wait_for(lambda spans: len(spans) >= 2)
    assert len(spans) == 2
    for span in spans:
        assert (span["name"], span["trace_id"]) == ("stage", TRACE_ID)
        assert span["parent_span_id"] == PARENT_ID
        attributes = span["attributes"]
        assert attributes["penstock.request.id"] == "100"
        assert attributes["penstock.stage.rows"] == 4
        assert attributes["penstock.stage.micro_batches"] == 2
        assert 0 < attributes["penstock.stage.compute_seconds"] < 30
        assert attributes["penstock.stage.wait_seconds"] >= 0
        assert span["start_ns"] < span["end_ns"]
    wire = {s["attributes"]["penstock.stage.index"]: s["attributes"] for s in spans}
    assert wire[0]["penstock.stage.wire_seconds"] > 0
    assert wire[1]["penstock.stage.wire_seconds"] == 0


async def test_a_sequence_cut_off_by_the_end_of_the_stream_leaves_its_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = start(0, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
    with otlp_receiver(tmp_path) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        telemetry = start_telemetry("penstock-stage", metrics_port=None)
        async with (
            running_chain(1, telemetry=telemetry) as stages,
            HandDrivenCoordinator(stages) as coordinator,
        ):
            await coordinator.open()
            await coordinator.run(micro_batch(1, {0: [1]}, starts=[traced]))
            await coordinator.sampled()
        telemetry.shutdown()
        spans = receiver.wait_for(lambda spans: len(spans) >= 1)
    assert [span["attributes"]["penstock.stage.rows"] for span in spans] == [1]
