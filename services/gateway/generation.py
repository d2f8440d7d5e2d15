"""From a checked request to a stream of responses, for every protocol that the gateway speaks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

from opentelemetry.context import Context
from opentelemetry.trace import Span, use_span
from penstock.v1 import coordinator_pb2, generation_pb2

from core import telemetry as names
from core.errors import (
    DeadlineExceeded,
    Exhausted,
    InvalidInput,
    NotFinite,
    NotFound,
    PenstockError,
    Unavailable,
)
from core.tokens.tokenizer import Tokenizer
from services.common.durations import positive_duration, seconds
from services.common.statuses import status_from_error
from services.common.telemetry import Telemetry, traceparent_of
from services.gateway.caller import Caller
from services.gateway.completion import Completion
from services.gateway.encoding_threads import EncodingThreads
from services.gateway.mesh_view import MeshView
from services.gateway.open_request import OpenRequest
from services.gateway.open_requests import OpenRequests
from services.gateway.validation import PreparedRequest, prepare

_LOG = logging.getLogger(__name__)
# How long the coordinator has to tell what a request cost after a stop string ended it.
_USAGE_TIMEOUT_S = 1.0
# Recording a value costs 10 us and more, too much for every token: each value stands for the
# mean gap of this many.
_TOKENS_A_RECORD = 32
_REASON_LABELS = {
    number: name.removeprefix("FINISH_REASON_").lower()
    for name, number in generation_pb2.FinishReason.items()
}


class TextGenerator:
    """Generates text for the servicers. Owns no state beyond its open requests."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        mesh: MeshView,
        requests: OpenRequests,
        telemetry: Telemetry,
        *,
        threads: EncodingThreads,
    ) -> None:
        """`threads` are those that tokenise."""
        self.tokenizer = tokenizer
        self.threads = threads
        self.mesh = mesh
        self._requests = requests
        self._telemetry = telemetry
        self._first_token = telemetry.histogram(names.TIME_TO_FIRST_TOKEN)
        self._token_gap = telemetry.histogram(names.INTER_TOKEN_LATENCY)
        self._duration = telemetry.histogram(names.REQUEST_DURATION)
        self._tokens = telemetry.counter(names.TOKENS)
        self._ended = telemetry.counter(names.REQUESTS_ENDED)
        self._refuses = False

    def refuse_new(self) -> None:
        """From now on every new request gets Unavailable; open ones go on."""
        self._refuses = True

    def models(self, caller: Caller) -> list[generation_pb2.Model]:
        """The models known that a caller may use, ready or not."""
        return [model for model in self.mesh.models if caller.allows_model(model.name)]

    def model(self, name: str, caller: Caller) -> generation_pb2.Model:
        """The model of that name; raises NotFound, Unavailable, and PermissionDenied."""
        if name:  # who may not use a model need not learn which ones there are
            caller.check_model(name)
        model = self.mesh.model(name)
        caller.check_model(model.name)
        return model

    async def generate(
        self,
        request: generation_pb2.GenerateRequest,
        *,
        timeout_s: float | None,
        caller: Caller,
        parent: Context | None = None,
    ) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        """Checks, submits and streams; the last response has `finish_reason` and `usage`.

        Ending the iteration early cancels the request at the coordinator. `parent` is the
        span's parent where that is not the current span. Raises errors of ours.
        Counts against the caller's quota until the iteration ends.
        """
        record = _Record(self, parent)
        try:
            if self._refuses:
                raise Unavailable("the gateway is shutting down")
            await caller.check_key()
            model = self.model(request.model, caller)
            record.model = model.name
            with caller.quota.request() as taken:
                prepared = await prepare(
                    request, model, self.tokenizer, threads=self.threads, limits=caller.limits
                )
                record.describe(prepared)
                completion = Completion(prepared, self.tokenizer)
                taken.reserve(len(prepared.token_ids), max_tokens=prepared.sampling.max_tokens)
                submission = _submission(prepared, timeout_s, caller, record.span)
                submitted = self._requests.submit(submission)
                try:
                    response = await _next_response(submitted, completion, record)
                    while not response.finish_reason:
                        if response.token_ids:
                            yield response
                        response = await _next_response(submitted, completion, record)
                    if not submitted.ended:  # a stop string ended it here
                        await self._cancel_and_await_usage(submitted, completion)
                    completion.finish(response)
                    record.outcome = _REASON_LABELS[response.finish_reason]
                    record.log(submitted.request_id)
                    yield response
                finally:
                    submitted.cancel()
                    taken.num_output_tokens = completion.num_tokens
        except PenstockError as error:
            record.outcome = status_from_error(error).code.name.lower()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.outcome = "cancelled"
            raise
        finally:
            record.end()

    async def _cancel_and_await_usage(self, request: OpenRequest, completion: Completion) -> None:
        request.cancel()
        try:
            async with asyncio.timeout(_USAGE_TIMEOUT_S):
                while not request.ended:
                    for update in (await request.receive()).updates:
                        if update.finish_reason:
                            completion.usage = update.usage
        except (TimeoutError, Unavailable):
            # The text is complete; only the queue's and the prefill's durations are missing.
            self._requests.forget(request)


async def _next_response(
    request: OpenRequest, completion: Completion, record: _Record
) -> generation_pb2.GenerateResponse:
    """Waits for news and returns what they say; raises the error that the coordinator ended
    the request with, if it did."""
    news = await request.receive()
    response = completion.take(news)
    record.count(len(response.token_ids))
    if news.updates:
        _raise_refusal(news.updates[-1])
    return response


class _Record:
    """Span and metrics of one request."""

    __slots__ = (
        *("_arrived", "_first_token_s", "_generator"),
        *("_num_in_window", "_num_tokens", "_window_began"),
        *("model", "outcome", "span"),
    )

    def __init__(self, generator: TextGenerator, parent: Context | None) -> None:
        self._generator = generator
        self._arrived = self._window_began = time.perf_counter()
        self._first_token_s = 0.0
        self._num_tokens = self._num_in_window = 0
        self.model = ""
        self.outcome = "internal"
        self.span: Span = generator._telemetry.tracer.start_span(
            names.GENERATE_SPAN.name,
            context=parent,
            attributes={names.OPERATION: "generate_content"},
        )

    def describe(self, prepared: PreparedRequest) -> None:
        num_tokens = len(prepared.token_ids)
        labels = {names.MODEL: self.model, names.TOKEN_TYPE: "input"}
        self._generator._tokens.add(num_tokens, labels)
        if not self.span.is_recording():
            return
        self.span.set_attributes({names.MODEL: self.model, names.INPUT_TOKENS: num_tokens})
        for name in ("max_tokens", "temperature", "top_k", "top_p"):
            self.span.set_attribute(f"gen_ai.request.{name}", getattr(prepared.sampling, name))
        for name in ("presence_penalty", "frequency_penalty"):
            self.span.set_attribute(f"gen_ai.request.{name}", getattr(prepared.sampling, name))
        # Attributes are signed; a seed need not be.
        self.span.set_attribute("gen_ai.request.seed", str(prepared.sampling.seed))

    def count(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        if not self._num_tokens:
            self._window_began = time.perf_counter()
            self._first_token_s = self._window_began - self._arrived
            self._generator._first_token.record(self._first_token_s, {names.MODEL: self.model})
        else:
            self._num_in_window += num_tokens
            if self._num_in_window >= _TOKENS_A_RECORD:
                self._record_gaps()
        self._num_tokens += num_tokens

    def _record_gaps(self) -> None:
        now = time.perf_counter()
        gap_s = (now - self._window_began) / self._num_in_window
        self._generator._token_gap.record(gap_s, {names.MODEL: self.model})
        self._window_began, self._num_in_window = now, 0

    def log(self, request_id: int) -> None:
        """Leaves a line of a request that was answered."""
        facts = {"request_id": request_id, "outcome": self.outcome, "tokens": self._num_tokens}
        facts["first_token_s"] = round(self._first_token_s, 4)
        facts["total_s"] = round(time.perf_counter() - self._arrived, 4)
        with use_span(self.span, record_exception=False):  # for the line's trace id
            _LOG.info("request answered", extra=facts)

    def end(self) -> None:
        if self._num_in_window:
            self._record_gaps()
        labels = {names.MODEL: self.model, names.OUTCOME: self.outcome}
        self._generator._ended.add(1, labels)
        self._generator._duration.record(time.perf_counter() - self._arrived, labels)
        if self._num_tokens:
            kind = {names.MODEL: self.model, names.TOKEN_TYPE: "output"}
            self._generator._tokens.add(self._num_tokens, kind)
        if self.span.is_recording():
            self.span.set_attribute(names.OUTPUT_TOKENS, self._num_tokens)
            self.span.set_attribute(names.FINISH_REASON, [self.outcome])
        self.span.end()


def _submission(
    prepared: PreparedRequest, timeout_s: float | None, caller: Caller, span: Span
) -> coordinator_pb2.Submission:
    submission = coordinator_pb2.Submission(
        token_ids=prepared.token_ids,
        sampling=prepared.sampling,
        traceparent=traceparent_of(span),
        cache_salt=caller.cache_salt,
        tenant=caller.share.tenant,
        priority=caller.share.priority,
    )
    if timeout_s is not None:
        submission.timeout.CopyFrom(positive_duration(timeout_s))
    return submission


def _raise_refusal(update: coordinator_pb2.RequestUpdate) -> None:
    """Raises the error that the coordinator ended the request with, if it did."""
    if update.finish_reason != generation_pb2.FINISH_REASON_ERROR:
        return
    refusal = update.refusal
    delay_s = seconds(refusal.retry_delay) if refusal.HasField("retry_delay") else None
    match refusal.code:
        case 3:
            raise InvalidInput("request", "", refusal.message)
        case 4:
            raise DeadlineExceeded(refusal.message)
        case 5:
            raise NotFound(refusal.message)
        case 8:
            raise Exhausted(refusal.message, retry_after_s=delay_s)
        case 14:
            raise Unavailable(refusal.message, retry_after_s=delay_s)
        case 15:
            raise NotFinite(refusal.message)
    raise PenstockError(refusal.message or "the mesh failed")
