"""Between seconds and the well-known type for durations."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration


def duration(seconds: float) -> Duration:
    """Rounded to nanoseconds; less than none is none."""
    message = Duration()
    message.FromNanoseconds(round(max(seconds, 0.0) * 1e9))
    return message


def positive_duration(seconds: float) -> Duration:
    """At least a nanosecond, where none would mean something else."""
    return duration(max(seconds, 1e-9))


def seconds(message: Duration) -> float:
    return message.ToNanoseconds() / 1e9
