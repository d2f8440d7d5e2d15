"""Spans of requests in the coordinator, made when a request ends, from its usage."""

from __future__ import annotations

from core import telemetry as names
from core.pipeline.actions import Usage
from services.common.telemetry import Telemetry, context_from


class RequestSpans:
    """Makes the queue, prefill and decode spans; does nothing while tracing is off."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    @property
    def enabled(self) -> bool:
        return self._telemetry.tracing

    def record(
        self,
        *,
        traceparent: str,
        request_id: int,
        arrived_ns: int,
        usage: Usage,
        finish_reason: str,
    ) -> None:
        """`arrived_ns`: Unix time of the arrival. Phases that were never reached get no span."""
        if not self._telemetry.tracing or not traceparent:
            return
        attributes: dict[str, str | int] = {names.REQUEST_ID: request_id}
        scheduled_ns = arrived_ns + int(usage.queue_s * 1e9)
        first_ns = scheduled_ns + int(usage.prefill_s * 1e9)
        last_ns = first_ns + int(usage.decode_s * 1e9)
        phases = [(names.QUEUE_SPAN.name, arrived_ns, scheduled_ns, attributes)]
        if scheduled_ns < first_ns:
            prefill = {**attributes, names.INPUT_TOKENS: usage.prompt_tokens}
            phases.append((names.PREFILL_SPAN.name, scheduled_ns, first_ns, prefill))
        if usage.completion_tokens:
            decode = {
                **attributes,
                names.OUTPUT_TOKENS: usage.completion_tokens,
                names.FINISH_REASON: finish_reason,
            }
            phases.append((names.DECODE_SPAN.name, first_ns, last_ns, decode))
        context = context_from(traceparent)
        for name, begin_ns, end_ns, facts in phases:
            span = self._telemetry.tracer.start_span(
                name, context=context, start_time=begin_ns, attributes=facts
            )
            span.end(end_time=end_ns)
