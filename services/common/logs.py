"""Structured logs: one JSON object a line, or a line for people on a terminal.

Write `log.info("stage ready", extra={"layers": "0:15"})`: the message names the
event, `extra` its facts. Inside a span, the trace id is added.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from opentelemetry import trace
from opentelemetry.context import Context

# What a stage logs before it compiles kernels, which takes up to a minute; the display of a
# mesh that starts looks for it.
COMPILING = "compiling kernels"

# Attributes that every LogRecord has; anything else came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(service: str, *, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream` (default: stderr), replacing earlier settings.

    `service` is the process's name in each line ("stage-0").
    """
    target = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(PeopleFormatter(service) if target.isatty() else JsonFormatter(service))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # Of its CUDA driver each module that is loaded or freed is news to numba.
    logging.getLogger("numba").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, trace_id, facts, error."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace_id = current_trace_id()
        if trace_id:
            line["trace_id"] = trace_id
        line.update(_facts(record))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        # In ASCII: what clients call things must neither end a line nor steer a terminal.
        return json.dumps(line, default=str)


class PeopleFormatter(logging.Formatter):
    """`12:34:56 INFO stage-0: message fact=value`, with the traceback below."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = "".join(f" {name}={value}" for name, value in _facts(record).items())
        said = _printable(f"{record.getMessage()}{facts}")
        line = f"{time} {record.levelname} {self._service}: {said}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def current_trace_id(context: Context | None = None) -> str:
    """Returns the trace id of the current span (of `context`, where given) as 32 hexadecimal
    digits, or an empty string."""
    span = trace.get_current_span(context).get_span_context()
    return f"{span.trace_id:032x}" if span.is_valid else ""


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _printable(text: str) -> str:
    """With escapes for what would end a line or steer a terminal: clients name things."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
