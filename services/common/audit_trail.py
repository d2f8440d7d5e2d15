"""Lets a process with an event loop write to the audit log: it does not wait for the disk."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core.errors import PenstockError
from services.common.audit import AuditLog, Detail

_LOG = logging.getLogger(__name__)


class AuditTrail:
    """Records in the order of the calls, on a thread of its own; see `AuditLog.record`.

    Its queue needs no bound: administrative events are rare, and refusals are limited where they
    are counted. What cannot be written is an error in the process's log.
    """

    def __init__(self, path: Path | None) -> None:
        """None: nothing is recorded."""
        self._log = None if path is None else AuditLog(path)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")

    def record(self, event: str, actor: str, **details: Detail) -> None:
        if self._log is not None:
            self._thread.submit(self._write, self._log, event, actor, details)

    def close(self) -> None:
        """Returns when all is written."""
        self._thread.shutdown()

    def _write(self, log: AuditLog, event: str, actor: str, details: dict[str, Detail]) -> None:
        try:
            log.record(event, actor, **details)
        except PenstockError as error:
            facts = {"event": event, "actor": actor, "why": str(error), **details}
            _LOG.error("an event could not be recorded", extra=facts)
