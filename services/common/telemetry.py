"""Traces and metrics of a process.

Traces are exported over OTLP/gRPC when the standard environment variables say so
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or
OTEL_TRACES_EXPORTER=otlp) and cost nothing otherwise: `Telemetry.tracing` is false,
and the tracer makes no spans. Metrics are served to Prometheus on a port of the
loopback interface; without a port nothing is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from threading import Timer
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, NoOpMeter, Observation
from opentelemetry.trace import NoOpTracer, Span, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from core.errors import InvalidInput
from core.telemetry import Kind, Metric

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

_PROPAGATOR = TraceContextTextMapPropagator()
Labels = Mapping[str, str | int]
METRICS_HOST = "127.0.0.1"
# What a collector has to take the last spans of a process that ends.
FLUSH_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """The tracer and meter of a process."""

    tracer: Tracer
    meter: Meter
    tracing: bool
    metrics_port: int | None
    _closers: list[Callable[[], None]] = field(default_factory=list)

    def counter(self, metric: Metric) -> metrics.Counter:
        """Makes the counter that `metric` describes."""
        assert metric.kind is Kind.COUNTER
        return self.meter.create_counter(
            metric.name, unit=metric.unit, description=metric.description
        )

    def histogram(self, metric: Metric) -> Histogram:
        """Makes the histogram that `metric` describes."""
        assert metric.kind is Kind.HISTOGRAM
        return self.meter.create_histogram(
            metric.name,
            unit=metric.unit,
            description=metric.description,
            explicit_bucket_boundaries_advisory=metric.buckets,
        )

    def observe(self, metric: Metric, read: Callable[[], float], *, labels: Labels) -> None:
        """Reports `read()` whenever the metrics are asked for, and costs nothing before.

        For gauges, and for counters whose sum is kept elsewhere (it must never
        shrink). `read` is called on the thread of the metrics server.
        """
        self.observe_many(metric, lambda: [(read(), labels)])

    def observe_many(
        self, metric: Metric, read: Callable[[], Iterable[tuple[float, Labels]]]
    ) -> None:
        """Like `observe`, for several label sets at once."""

        def callback(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, dict(labels)) for value, labels in read()]

        create: Any = {
            Kind.GAUGE: self.meter.create_observable_gauge,
            Kind.COUNTER: self.meter.create_observable_counter,
        }[metric.kind]
        create(metric.name, [callback], unit=metric.unit, description=metric.description)

    def shutdown(self) -> None:
        """Sends what is left and stops the metrics server. Blocks for FLUSH_TIMEOUT_S at most."""
        while self._closers:
            self._closers.pop()()


def start_telemetry(
    service: str,
    *,
    metrics_port: int | None,
    attributes: Mapping[str, str | int] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Telemetry:
    """Starts the telemetry of a process named `service` ("penstock-stage").

    `attributes` describe the process in every span and metric. Port 0 takes a free
    one; `Telemetry.metrics_port` has it. Raises InvalidInput when the port is taken
    or the environment asks for an exporter that there is not.
    """
    closers: list[Callable[[], None]] = []
    tracing = _wants_traces(environment)
    tracer: Tracer = NoOpTracer()
    meter: Meter = NoOpMeter("penstock")
    port = None
    if tracing:
        tracer = _start_traces(_resource(service, attributes), closers=closers)
    if metrics_port is not None:
        meter, port = _start_metrics(_resource(service, attributes), metrics_port, closers=closers)
    return Telemetry(
        tracer=tracer, meter=meter, tracing=tracing, metrics_port=port, _closers=closers
    )


def no_telemetry() -> Telemetry:
    """Returns telemetry that records nothing."""
    return start_telemetry("penstock", metrics_port=None, environment={})


def traceparent_of(span: Span) -> str:
    """Returns the W3C `traceparent` that names `span` as the parent; empty when not traced."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def context_from(traceparent: str) -> Context:
    """Returns a context whose current span is the remote one that `traceparent` names.

    A malformed or empty string gives an empty context: a new trace begins there.
    """
    return _PROPAGATOR.extract({"traceparent": traceparent}, context=Context())


def callers_context(metadata: Iterable[tuple[str, Any]] | None) -> Context:
    """As `context_from`, of the traceparent among a call's metadata, if there is one."""
    found = (value for key, value in metadata or () if key == "traceparent")
    return context_from(str(next(found, "")))


def _wants_traces(environment: Mapping[str, str]) -> bool:
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if exporter not in ("", "otlp"):
        raise InvalidInput("OTEL_TRACES_EXPORTER", exporter, "otlp or none")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    wanted = exporter == "otlp" or any(environment.get(name) for name in endpoints)
    if wanted:
        _check_protocol(environment)
    return wanted


def _check_protocol(environment: Mapping[str, str]) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environment.get(name, "grpc") != "grpc":
            raise InvalidInput(name, environment[name], "grpc")


def _resource(service: str, attributes: Mapping[str, str | int] | None) -> Resource:
    from opentelemetry.sdk.resources import Resource

    return Resource.create(
        {"service.name": service, "service.namespace": "penstock", **(attributes or {})}
    )


def _start_traces(resource: Resource, *, closers: list[Callable[[], None]]) -> Tracer:
    # Imported only here: exporter and SDK cost 0.2 s of a start that does not trace.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))

    def close() -> None:
        # By itself the SDK tries for 30 s to reach a collector that is gone.
        give_up = Timer(FLUSH_TIMEOUT_S, exporter.shutdown)
        give_up.start()
        provider.shutdown()
        give_up.cancel()
        give_up.join()

    closers.append(close)
    return provider.get_tracer("penstock")


def _start_metrics(
    resource: Resource, port: int, *, closers: list[Callable[[], None]]
) -> tuple[Meter, int]:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
    provider = MeterProvider(
        [reader],
        resource=resource,
        # The reader leaves exemplars out; looking for a span at every value is not free.
        exemplar_filter=AlwaysOffExemplarFilter(),
        shutdown_on_exit=False,
    )
    try:
        server, thread = start_http_server(port, addr=METRICS_HOST, registry=registry)
    except (OSError, OverflowError) as error:
        provider.shutdown()
        raise InvalidInput("metrics_port", port, "a port that is free on this machine") from error

    def close() -> None:
        server.shutdown()
        thread.join()
        server.server_close()
        provider.shutdown()

    closers.append(close)
    return provider.get_meter("penstock"), server.server_port
