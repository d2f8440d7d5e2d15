"""Telemetry: off at no cost, on by the standard variables, over a real collector."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from opentelemetry.trace import INVALID_SPAN

from core import telemetry as names
from core.errors import InvalidInput
from services.common.telemetry import (
    FLUSH_TIMEOUT_S,
    context_from,
    no_telemetry,
    start_telemetry,
    traceparent_of,
)
from tests.support.metrics import scrape
from tests.support.otlp_receiver import otlp_receiver

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_names_are_unique_and_labels_are_declared() -> None:
    assert len(names.METRICS) > 20
    assert len({metric.name for metric in names.METRICS}) == len(names.METRICS)
    assert len({span.name for span in names.SPANS}) == len(names.SPANS)
    for metric in names.METRICS:
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert bool(metric.buckets) == (metric.kind is names.Kind.HISTOGRAM)


def test_spans_reach_a_collector_in_another_process_under_their_remote_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with otlp_receiver(tmp_path) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        telemetry = start_telemetry("penstock-stage", metrics_port=None, attributes={"a": 1})
        assert telemetry.tracing
        with telemetry.tracer.start_as_current_span(
            "stage", context=context_from(TRACEPARENT)
        ) as span:
            onward = traceparent_of(span)
        telemetry.shutdown()
        (received,) = receiver.wait_for(lambda spans: len(spans) == 1)
    assert received["trace_id"] == TRACEPARENT.split("-")[1]
    assert received["parent_span_id"] == TRACEPARENT.split("-")[2]
    assert received["service"] == "penstock-stage"
    assert received["resource"]["a"] == 1
    assert onward == f"00-{received['trace_id']}-{received['span_id']}-01"


def test_a_collector_that_does_not_answer_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, answers nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        telemetry = start_telemetry("penstock-stage", metrics_port=None)
        telemetry.tracer.start_span("stage").end()
        started_s = time.monotonic()
        telemetry.shutdown()
        assert time.monotonic() - started_s < FLUSH_TIMEOUT_S + 3


@pytest.mark.parametrize(
    ("environment", "tracing"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4317"}, True),
    ],
)
def test_traces_are_on_exactly_when_the_standard_variables_say_so(
    environment: dict[str, str], tracing: bool
) -> None:
    telemetry = start_telemetry("penstock-test", metrics_port=None, environment=environment)
    assert telemetry.tracing is tracing
    telemetry.shutdown()


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
    ],
)
def test_an_exporter_that_there_is_not_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="OTEL_"):
        start_telemetry("penstock-test", metrics_port=None, environment=environment)


def test_without_traces_nothing_is_exported_or_named() -> None:
    telemetry = no_telemetry()
    with telemetry.tracer.start_as_current_span("stage") as span:
        assert traceparent_of(span) == ""
    assert traceparent_of(INVALID_SPAN) == ""


@pytest.mark.parametrize("text", ["", "garbage", "00-00-00-00", "ff-" + TRACEPARENT[3:]])
def test_a_malformed_traceparent_begins_a_new_trace(text: str) -> None:
    assert not context_from(text)


def test_metrics_are_served_with_unit_labels_and_buckets() -> None:
    telemetry = start_telemetry("penstock-test", metrics_port=0, environment={})
    telemetry.counter(names.TOKENS).add(3, {names.MODEL: "tiny", names.TOKEN_TYPE: "output"})
    telemetry.histogram(names.INTER_TOKEN_LATENCY).record(0.012, {names.MODEL: "tiny"})
    telemetry.observe(names.STAGE_BUSY, lambda: 1.5, labels={names.MODEL: "tiny", names.STAGE: 0})
    samples = scrape(telemetry.metrics_port)
    telemetry.shutdown()
    assert samples.value("penstock_tokens_total", {"gen_ai_token_type": "output"}) == 3
    assert samples.value("penstock_stage_busy_seconds_total", {"penstock_stage_index": "0"}) == 1.5
    bucket = "gen_ai_server_time_per_output_token_seconds_bucket"
    assert samples.value(bucket, {"le": "0.01"}) == 0
    assert samples.value(bucket, {"le": "0.015"}) == 1


def test_a_taken_metrics_port_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"metrics_port is {port}.*free"):
            start_telemetry("penstock-test", metrics_port=port, environment={})


def test_a_process_without_telemetry_imports_no_sdk() -> None:
    program = (
        "import sys; from services.common.telemetry import no_telemetry; no_telemetry();"
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
