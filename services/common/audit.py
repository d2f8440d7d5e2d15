"""The audit log: who did what to a deployment, in lines that cannot be changed unnoticed.

Each line is a JSON object with a sequence number, the time, who, what, details, and the SHA-256 of
the line before. A file beside it, the *head*, has number and hash of the last line: without it a
log that lost its end would look whole. Whoever may write to the folder can write a new chain and a
new head; against them, note the head that `penstock audit verify` prints somewhere else.

A line that was cut off when its writer died stays: the next writer ends it, and notes its hash.
`audit_check.py` reads all this.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from core.errors import Unavailable
from services.common.data_folder import AUDIT_NAME, default_data_folder, open_private

NO_LINE = "0" * 64  # what stands for the hash of the line before the first
TORN = "line cut off"
_CHUNK_BYTES = 4096

Detail = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class AuditLine:
    """One event, as it is written."""

    sequence: int  # from 1
    time: str  # ISO 8601, UTC
    actor: str
    event: str
    details: dict[str, Detail]
    previous: str  # hash of the line before


class Head(NamedTuple):
    """The last line of a log, or where it ended some time ago."""

    sequence: int = 0
    hash: str = NO_LINE


class AuditLog:
    """Appends to one log; any number of processes and threads may."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def record(self, event: str, actor: str, **details: Detail) -> None:
        """Adds a line, which is on the disk when this returns; raises Unavailable."""
        try:
            self._record(event, actor, details)
        except OSError as error:
            raise Unavailable(f"the audit log {self.path} cannot be written: {error}") from error

    def _record(self, event: str, actor: str, details: dict[str, Detail]) -> None:
        descriptor = open_private(self.path, os.O_RDWR | os.O_APPEND)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = self._end(descriptor)
            if end.torn:
                lost: dict[str, Detail] = {"bytes": len(end.torn), "sha256": line_hash(end.torn)}
                end = self._append(descriptor, end, TORN, "audit", lost)
            self._append(descriptor, end, event, actor, details)
        finally:
            os.close(descriptor)

    def _append(
        self, descriptor: int, end: _End, event: str, actor: str, details: dict[str, Detail]
    ) -> _End:
        line = AuditLine(
            sequence=end.head.sequence + 1,
            time=datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            actor=actor,
            event=event,
            details=details,
            previous=end.head.hash,
        )
        data = json.dumps(asdict(line)).encode()
        left = (b"\n" if end.is_open else b"") + data + b"\n"
        while left:  # a full disk takes a part
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        head = Head(line.sequence, line_hash(data))
        write_head(self.path, head)
        return _End(head)

    def _end(self, descriptor: int) -> _End:
        """Where to go on.

        Where lines of the end are missing or changed, the head still knows: the gap then shows
        for ever, instead of being closed by the next line or taken for one that was cut off.
        """
        end = _read_end(descriptor)
        head = read_head(self.path) or Head()
        if head.sequence > end.head.sequence:
            return _End(head, is_open=end.is_open)
        # A writer that died may not have come to writing the head.
        return end._replace(head=head) if head.sequence == end.head.sequence else end


class _End(NamedTuple):
    """The end of a log: the last line that can be read, and what stands behind it."""

    head: Head
    torn: bytes = b""
    is_open: bool = False  # its last line was not ended


def record(event: str, actor: str | None = None, **details: Detail) -> None:
    """Adds a line to the log of this machine's deployment; the actor is this user by default."""
    AuditLog(default_data_folder() / AUDIT_NAME).record(event, actor or this_user(), **details)


def this_user() -> str:
    """Who runs this process."""
    try:
        return f"user {getpass.getuser()}"
    except (KeyError, OSError):  # a user without a name, in a container say
        return f"user {os.getuid()}"


# --- what writers and readers share


def line_hash(line: bytes) -> str:
    """`line` is without its end."""
    return sha256(line).hexdigest()


def parse_line(line: bytes) -> AuditLine | None:
    """Reads a line; None where it is none."""
    try:
        parsed = AuditLine(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    fits = isinstance(parsed.sequence, int) and isinstance(parsed.details, dict)
    return parsed if fits else None


def head_path(path: Path) -> Path:
    return path.with_suffix(".head")


def read_head(path: Path) -> Head | None:
    """The head of the log at `path`; None where there is none that can be read."""
    try:
        fields = json.loads(head_path(path).read_text())
        return Head(int(fields["sequence"]), str(fields["hash"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_head(path: Path, head: Head) -> None:
    """Replaces the head in one step."""
    temporary = head_path(path).with_suffix(".head.new")
    descriptor = open_private(temporary, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, json.dumps(head._asdict()).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(head_path(path))


def unreadable(lines: Iterable[bytes]) -> bytes:
    """What lines that cannot be read, and follow each other, were cut off from."""
    return b"\n".join(lines).strip(b"\n")


def _read_end(descriptor: int) -> _End:
    start = os.fstat(descriptor).st_size
    data = b""
    while start:
        size = min(start, _CHUNK_BYTES)
        start -= size
        data = os.pread(descriptor, size, start) + data
        lines = data.split(b"\n")
        # The first piece may be the rest of a line that begins further in front.
        for index in range(len(lines) - 1, 0 if start else -1, -1):
            line = parse_line(lines[index])
            if line is not None:
                head = Head(line.sequence, line_hash(lines[index]))
                return _End(head, unreadable(lines[index + 1 :]), bool(lines[-1]))
    return _End(Head(), unreadable(data.split(b"\n")), bool(data) and data[-1:] != b"\n")
