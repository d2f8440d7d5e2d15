"""The one table between our errors and gRPC statuses with google.rpc details.

    InvalidInput       INVALID_ARGUMENT     BadRequest: the field, its value, what is allowed
    NotFound           NOT_FOUND            BadRequest: the field, where a request named it
    Unauthenticated    UNAUTHENTICATED
    PermissionDenied   PERMISSION_DENIED
    Exhausted          RESOURCE_EXHAUSTED   RetryInfo, where trying again can help; QuotaFailure,
                                            where the quota is somebody's own
    Unavailable        UNAVAILABLE          RetryInfo
    Superseded         ABORTED
    DeadlineExceeded   DEADLINE_EXCEEDED
    KeyRefused         PERMISSION_DENIED
    ChecksumMismatch   DATA_LOSS
    ManifestMismatch   DATA_LOSS
    SealBroken         DATA_LOSS
    CorruptWeights     FAILED_PRECONDITION
    CorruptLog         DATA_LOSS
    PlanImpossible     FAILED_PRECONDITION
    NotFinite          DATA_LOSS
    MalformedMessage   INVALID_ARGUMENT
    ProtocolViolation  FAILED_PRECONDITION
    anything else      INTERNAL             an opaque id that the log has beside the traceback

Every status also carries an ErrorInfo whose reason names the class in capitals.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from core import errors
from services.common.durations import duration, seconds

DOMAIN = "penstock"
DETAILS_KEY = "grpc-status-details-bin"


class _Row(NamedTuple):
    error: type[errors.PenstockError]
    code: grpc.StatusCode
    reason: str


# Subclasses stand before their bases: the first row that matches is taken.
_TABLE = (
    _Row(errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
    _Row(errors.NotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    _Row(errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    _Row(errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    _Row(errors.Exhausted, grpc.StatusCode.RESOURCE_EXHAUSTED, "EXHAUSTED"),
    _Row(errors.Unavailable, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    _Row(errors.Superseded, grpc.StatusCode.ABORTED, "SUPERSEDED"),
    _Row(errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    _Row(errors.KeyRefused, grpc.StatusCode.PERMISSION_DENIED, "KEY_REFUSED"),
    _Row(errors.ChecksumMismatch, grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH"),
    _Row(errors.ManifestMismatch, grpc.StatusCode.DATA_LOSS, "MANIFEST_MISMATCH"),
    _Row(errors.SealBroken, grpc.StatusCode.DATA_LOSS, "SEAL_BROKEN"),
    _Row(errors.CorruptWeights, grpc.StatusCode.FAILED_PRECONDITION, "CORRUPT_WEIGHTS"),
    _Row(errors.CorruptLog, grpc.StatusCode.DATA_LOSS, "CORRUPT_LOG"),
    _Row(errors.PlanImpossible, grpc.StatusCode.FAILED_PRECONDITION, "PLAN_IMPOSSIBLE"),
    _Row(errors.NotFinite, grpc.StatusCode.DATA_LOSS, "NOT_FINITE"),
    _Row(errors.MalformedMessage, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE"),
    _Row(errors.ProtocolViolation, grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_VIOLATION"),
    _Row(errors.PenstockError, grpc.StatusCode.UNKNOWN, "PENSTOCK_ERROR"),
)
_BY_REASON = {row.reason: row for row in _TABLE}
_BY_CODE = {row.code: row for row in reversed(_TABLE)}


class Status(NamedTuple):
    """What an RPC ends with."""

    code: grpc.StatusCode
    message: str
    details: bytes  # a google.rpc.Status, with code and message once more

    @property
    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What brings the details to gRPC's clients."""
        return ((DETAILS_KEY, self.details),)


def status_from_error(error: errors.PenstockError) -> Status:
    """Returns the status of an error, details included."""
    row = next(row for row in _TABLE if isinstance(error, row.error))
    return _status(row.code, str(error), [_error_info(row.reason, error), *_details(error)])


def internal_status(error_id: str) -> Status:
    """Returns the status of an unexpected exception, which shows nothing but its id."""
    info = error_details_pb2.ErrorInfo(
        reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id}
    )
    message = f"internal error {error_id}; the server's log says more"
    return _status(grpc.StatusCode.INTERNAL, message, [info])


def error_from_rpc(error: grpc.RpcError) -> errors.PenstockError:
    """Returns the error of ours that an RPC's status stands for.

    A status from elsewhere (a proxy, gRPC itself) is translated by its code; codes
    without a row become Unavailable without a retry delay.
    """
    message = _call_of(error).details() or _call_of(error).code().name
    status = rpc_status.from_call(error)
    details = _unpack(status) if status is not None else _Details()
    row = _BY_REASON.get(details.reason) or _BY_CODE.get(_call_of(error).code())
    kind = row.error if row is not None else errors.Unavailable
    if kind is errors.InvalidInput:
        return _invalid_input(message, details)
    if kind is errors.Exhausted:
        return errors.Exhausted(
            message, retry_after_s=details.retry_after_s, subject=details.subject
        )
    if kind is errors.Unavailable:
        return errors.Unavailable(message, retry_after_s=details.retry_after_s)
    if kind is errors.NotFound:
        return errors.NotFound(message, field=(details.metadata or {}).get("field", ""))
    return kind(message)


class _Details(NamedTuple):
    reason: str = ""
    metadata: dict[str, str] | None = None
    retry_after_s: float | None = None
    subject: str = ""


def _status(code: grpc.StatusCode, message: str, details: Iterable[Any]) -> Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return Status(code, message, status.SerializeToString())


def _error_info(reason: str, error: errors.PenstockError) -> Any:
    metadata = {}
    if isinstance(error, errors.InvalidInput):
        metadata = {"field": error.field, "value": error.value, "allowed": error.allowed}
    elif isinstance(error, errors.NotFound) and error.field:
        metadata = {"field": error.field}
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _details(error: errors.PenstockError) -> Iterable[Any]:
    if isinstance(error, errors.InvalidInput):
        description = f"value {error.value}; allowed: {error.allowed}"
        yield _bad_request(error.field, description, reason="INVALID_INPUT")
    if isinstance(error, errors.NotFound) and error.field:
        yield _bad_request(error.field, str(error), reason="NOT_FOUND")
    if isinstance(error, errors.Exhausted | errors.Unavailable) and error.retry_after_s is not None:
        yield error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s))
    if isinstance(error, errors.Exhausted) and error.subject:
        yield _quota_failure(error)


def _bad_request(field: str, description: str, *, reason: str) -> Any:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=field, description=description, reason=reason
    )
    return error_details_pb2.BadRequest(field_violations=[violation])


def _quota_failure(error: errors.Exhausted) -> Any:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=error.subject, description=str(error)
    )
    return error_details_pb2.QuotaFailure(violations=[violation])


def _unpack(status: Any) -> _Details:
    details = _Details()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    quota = error_details_pb2.QuotaFailure()
    for packed in status.details:
        if packed.Unpack(info) and info.domain == DOMAIN:
            details = details._replace(reason=info.reason, metadata=dict(info.metadata))
        elif packed.Unpack(retry):
            details = details._replace(retry_after_s=seconds(retry.retry_delay))
        elif packed.Unpack(quota) and quota.violations:
            details = details._replace(subject=quota.violations[0].subject)
    return details


def _invalid_input(message: str, details: _Details) -> errors.InvalidInput:
    metadata = details.metadata or {}
    error = errors.InvalidInput(
        metadata.get("field", "request"), "", metadata.get("allowed", message)
    )
    # The value arrives as text that was shortened already.
    error.value = metadata.get("value", "")
    error.args = (message,)
    return error


def _call_of(error: grpc.RpcError) -> Any:
    """An RpcError raised by a call is the call, or has its methods; the types do not say so."""
    return error
