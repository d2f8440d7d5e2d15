"""The one interceptor of every server: errors to statuses, telemetry, logs.

It stands around every handler. A request that is no valid protobuf (invalid UTF-8
in a string, say) becomes INVALID_ARGUMENT with details instead of gRPC's bare
INTERNAL. Errors of ours become the statuses of `statuses.py`. Any other exception
becomes INTERNAL with an id; the log has the id and the traceback. Who may call what is
checked here too (`identity.py`), before a handler sees anything. RPCs with a single
request get a server span; a stream of requests gets none (it lives for hours: its
servicer makes one span per request).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind

from core import telemetry as names
from core.errors import InvalidInput, PenstockError, PermissionDenied, ProtocolViolation
from services.common.identity import CallPolicy
from services.common.logs import current_trace_id
from services.common.statuses import Status, internal_status, status_from_error
from services.common.telemetry import Telemetry, callers_context

_LOG = logging.getLogger(__name__)
# Asked for all the time, and of no interest to anyone's trace.
_UNTRACED = ("/grpc.health.", "/grpc.reflection.")


class Undecodable(NamedTuple):
    """Stands for a request that is not valid protobuf until a handler can refuse it."""

    size_bytes: int


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors into statuses, and measures and traces every RPC.

    With a `policy`, calls of those that may not make them end here.
    """

    def __init__(self, telemetry: Telemetry, *, policy: CallPolicy | None = None) -> None:
        self._telemetry = telemetry
        self._policy = policy
        self._duration = telemetry.histogram(names.RPC_DURATION)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # unknown method: gRPC answers UNIMPLEMENTED
            return handler
        return self._wrap(handler, handler_call_details)

    def _wrap(self, handler: Any, details: Any) -> grpc.RpcMethodHandler:
        kind = kind_of(handler)
        behaviour = getattr(handler, kind)
        run = _run_streaming if handler.response_streaming else _run_unary

        async def guarded(request: Any, context: Any) -> Any:
            checked = _checked_stream(request) if handler.request_streaming else request
            call = _Call(self, details, context, traced=not handler.request_streaming)
            return await call.run(run, behaviour, checked)

        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            guarded,
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


class _Call:
    """One RPC on its way through the interceptor."""

    def __init__(
        self, interceptor: ServerInterceptor, details: Any, context: Any, *, traced: bool
    ) -> None:
        self._interceptor = interceptor
        self._method: str = details.method
        self._metadata = details.invocation_metadata
        self._context = context
        self._traced = traced and interceptor._telemetry.tracing

    async def run(self, run: Any, behaviour: Any, request: Any) -> Any:
        started = time.perf_counter()
        code = grpc.StatusCode.CANCELLED
        try:
            with self._span() as span:
                try:
                    self._check_caller()
                    response = await run(behaviour, request, self._context)
                    code = _code_of(self._context)
                    return response
                except grpc.aio.AbortError:  # the handler chose its status itself
                    code = _code_of(self._context)
                    _mark(span, code)
                    raise
                except grpc.aio.InternalError:  # the peer has gone: gRPC ends the call quietly
                    raise
                except Exception as error:
                    status = self._status_of(error)
                    code = status.code
                    _mark(span, code)
        finally:
            self._record(time.perf_counter() - started, code)
        # Outside the span, which would record gRPC's own AbortError, and counted already when the
        # caller sees it.
        return await self._context.abort(status.code, status.message, status.trailing_metadata)

    def _check_caller(self) -> None:
        if self._interceptor._policy is not None:
            self._interceptor._policy.check(self._method, self._context.auth_context())

    def _status_of(self, error: Exception) -> Status:
        if isinstance(error, PenstockError):
            status = status_from_error(error)
            is_suspect = isinstance(error, ProtocolViolation | PermissionDenied)
            level = logging.WARNING if is_suspect else logging.INFO
            facts = {"method": self._method, "code": status.code.name, "why": str(error)}
            facts |= {"peer": self._context.peer(), **self._callers_trace()}
            _LOG.log(level, "rpc refused", extra=facts)
            return status
        error_id = secrets.token_hex(8)
        facts = {"method": self._method, "error_id": error_id, **self._callers_trace()}
        _LOG.error("rpc failed", extra=facts, exc_info=error)
        return internal_status(error_id)

    def _span(self) -> AbstractContextManager[Span | None]:
        if not self._traced or self._method.startswith(_UNTRACED):
            return nullcontext()
        return self._interceptor._telemetry.tracer.start_as_current_span(
            self._method.removeprefix("/"),
            context=self._parent(),
            kind=SpanKind.SERVER,
            attributes={names.RPC_SYSTEM: "grpc", names.RPC_METHOD: self._method.removeprefix("/")},
        )

    def _parent(self) -> Context:
        return callers_context(self._metadata)

    def _callers_trace(self) -> dict[str, str]:
        """The caller's trace id for the log; while this process traces, its span gives it."""
        trace_id = "" if self._traced else current_trace_id(self._parent())
        return {"trace_id": trace_id} if trace_id else {}

    def _record(self, duration_s: float, code: grpc.StatusCode) -> None:
        labels = {
            names.RPC_SYSTEM: "grpc",
            names.RPC_METHOD: self._method.removeprefix("/"),
            names.RPC_STATUS: code.name,
        }
        self._interceptor._duration.record(duration_s, labels)


async def _run_unary(behaviour: Any, request: Any, context: Any) -> Any:
    _refuse_undecodable(request)
    return await behaviour(request, context)


async def _run_streaming(behaviour: Any, request: Any, context: Any) -> None:
    _refuse_undecodable(request)
    result = behaviour(request, context)
    if not hasattr(result, "__aiter__"):  # a coroutine that writes by itself
        await result
        return
    async with aclosing(result) as responses:
        async for response in responses:
            await context.write(response)


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _refuse_undecodable(request)
        yield request


def _refuse_undecodable(request: Any) -> None:
    if isinstance(request, Undecodable):
        allowed = "a protobuf of the method's request type, its strings in UTF-8"
        raise InvalidInput("request", f"{request.size_bytes} bytes", allowed)


def _tolerant(deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialise is None:
        return None

    def tolerant(data: bytes) -> Any:
        try:
            return deserialise(data)
        except DecodeError:
            return Undecodable(len(data))

    return tolerant


def kind_of(handler: Any) -> str:
    """What gRPC calls its sides: "unary_stream", say."""
    sides = ("stream" if streaming else "unary" for streaming in _streaming(handler))
    return "_".join(sides)


def _streaming(handler: Any) -> tuple[bool, bool]:
    return handler.request_streaming, handler.response_streaming


def _code_of(context: Any) -> grpc.StatusCode:
    """The status a handler set by itself; the context has it as an enum, a number or not at all."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.OK)


def _mark(span: Span | None, code: grpc.StatusCode) -> None:
    if span is not None:
        span.set_attribute(names.RPC_STATUS, code.name)
