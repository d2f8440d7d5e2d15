"""Stands before every handler of the gateway: nobody gets further whom `access.py` refuses.

A refused request is not even parsed. The interceptor of services/common stands around this one,
and turns the error into a status.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from core.errors import PenstockError, PermissionDenied, Unauthenticated
from services.common.audit_trail import AuditTrail
from services.common.interceptors import kind_of
from services.gateway.access import OPEN_TO_ALL, Access
from services.gateway.caller import set_caller

# One line of refusals in so many seconds: a few MB a day, whoever knocks how often.
REFUSAL_INTERVAL_S = 10.0


class Refusals:
    """Brings refused callers into the audit log: the first at once, and then counts of them."""

    def __init__(self, trail: AuditTrail, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._trail = trail
        self._clock = clock
        self._num_unwritten = 0
        self._written_at = -REFUSAL_INTERVAL_S

    def note(self, *, method: str, peer: str, why: str) -> None:
        self._num_unwritten += 1
        now = self._clock()
        if now - self._written_at < REFUSAL_INTERVAL_S:
            return
        facts = {"method": method, "peer": peer, "why": why}
        self._trail.record("access refused", "gateway", refusals=self._num_unwritten, **facts)
        self._num_unwritten, self._written_at = 0, now


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets handlers run only for callers that may call them."""

    def __init__(self, access: Access, refusals: Refusals) -> None:
        self._access = access
        self._refusals = refusals

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(OPEN_TO_ALL):
            return handler
        metadata: Any = handler_call_details.invocation_metadata
        try:
            # gRPC runs the handler in this task, where it finds its caller.
            set_caller(await self._access.authorise(method, metadata))
        except PenstockError as error:
            return self._refusing(handler, method, error)
        return handler

    def _refusing(self, handler: Any, method: str, error: PenstockError) -> Any:
        """A handler of the same kind that raises the error."""

        async def refuse(_: Any, context: Any) -> None:
            if isinstance(error, Unauthenticated | PermissionDenied):
                self._refusals.note(method=method, peer=context.peer(), why=str(error))
            raise error

        make: Any = getattr(grpc, f"{kind_of(handler)}_rpc_method_handler")
        return make(refuse, response_serializer=handler.response_serializer)
