"""Every error that Penstock raises on purpose.

PenstockError
├── InvalidInput          a request or option is wrong: the field, its value, what is allowed
├── NotFound              a model, file or version that does not exist
├── Unauthenticated       the caller's key is missing, unknown, expired or revoked
├── PermissionDenied      the caller is known, and may not do this
├── Exhausted             a bound was reached; try again after `retry_after_s`
├── Unavailable           a part of the mesh is down; try again after `retry_after_s`
├── Superseded            another coordinator has taken over
├── DeadlineExceeded      the caller's deadline passed
├── CorruptWeights        a weight file is truncated, damaged or of an unsupported type
│   ├── ManifestMismatch  its bytes are not those of the manifest
│   └── SealBroken        a sealed model is not as its sealer signed it
├── KeyRefused            an identity may not open a part of a sealed model
├── CorruptLog            the audit log was changed, or lines of it are missing
├── NotFinite             the model's result is NaN or infinite where numbers are wanted
├── PlanImpossible        no partition satisfies the constraints; the message has the numbers
└── ProtocolViolation     a peer sent what does not fit the manifest or the stream's state
    ├── MalformedMessage  the message is wrong in itself, whatever the state
    └── ChecksumMismatch  bytes changed between the stages

`services/common/statuses.py` is the one table that maps these to gRPC statuses.
"""

from __future__ import annotations


def shown(value: object) -> str:
    """What was seen, as a message shows it: on one line, and short, whatever a client sent."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


class PenstockError(Exception):
    """Root of the tree. The message is one sentence for people and leaks no internals."""


class InvalidInput(PenstockError):
    """A request or option is wrong.

    `field` is the path of the offending field (`sampling.temperature`), `value`
    what was seen (shortened), `allowed` what would be accepted.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = shown(value)
        self.allowed = allowed
        super().__init__(f"{field} is {self.value}; allowed: {allowed}")


class NotFound(PenstockError):
    """What was named does not exist; the message lists what does.

    `field` is the field of a request that named it; empty where no request did.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        self.field = field
        super().__init__(message)


class Unauthenticated(PenstockError):
    """Nobody is known by the key that came with a request, or none came. The message tells those
    who do not hold a key nothing about it."""


class PermissionDenied(PenstockError):
    """The caller is known, and may not do this."""


class Exhausted(PenstockError):
    """A bound was reached. `retry_after_s` is None where trying again cannot help.

    `subject` is whose quota it was ("key 1f2e"); empty where the bound is common to all.
    """

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, subject: str = ""
    ) -> None:
        self.retry_after_s = retry_after_s
        self.subject = subject
        super().__init__(message)


class Unavailable(PenstockError):
    """A part of the mesh is down; the request may succeed after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float | None = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Superseded(PenstockError):
    """Another coordinator has taken over what this one had."""


class DeadlineExceeded(PenstockError):
    """The caller's deadline passed before the answer was complete."""


class CorruptWeights(PenstockError):
    """A weight file is truncated, damaged or of an unsupported type."""


class CorruptLog(PenstockError):
    """The audit log is not what was written; the message names the line."""


class ManifestMismatch(CorruptWeights):
    """Bytes of a model are not those that its manifest promises."""


class SealBroken(CorruptWeights):
    """A sealed model was changed, moved, cut short, or signed by somebody who is not trusted."""


class KeyRefused(PenstockError):
    """An identity holds no key for a part of a sealed model: it never did, or it was revoked."""


class NotFinite(PenstockError):
    """The model's result is NaN or infinite where numbers are wanted: weights or activations are
    damaged, or too big for the number format."""


class PlanImpossible(PenstockError):
    """No partition satisfies the constraints."""


class ProtocolViolation(PenstockError):
    """A peer sent what does not fit the loaded manifest or the state of the stream."""


class MalformedMessage(ProtocolViolation):
    """A message whose own fields contradict each other or the loaded manifest."""


class ChecksumMismatch(ProtocolViolation):
    """Bytes changed on their way between two stages."""
