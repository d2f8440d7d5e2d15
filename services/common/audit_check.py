"""Finds out whether an audit log is whole; see `audit.py` for what it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import CorruptLog, NotFound
from services.common.audit import (
    TORN,
    AuditLine,
    Head,
    line_hash,
    parse_line,
    read_head,
    unreadable,
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a whole log holds. `notes` are oddities that an accident explains."""

    head: Head
    notes: tuple[str, ...]


def verify(path: Path, *, expected_head: str | None = None) -> Verdict:
    """Reads the whole log; raises CorruptLog naming the line, NotFound where there is no log.

    `expected_head` is the hash of a line that was its last at some time: the log may have grown
    since, but must hold that line.
    """
    check = _Check()
    for number, line in enumerate(_read(path), start=1):
        check.take(number, line)
    check.end(read_head(path), expected_head)
    return Verdict(head=check.head, notes=tuple(check.notes))


def read_lines(path: Path) -> Iterator[AuditLine]:
    """All lines that can be read, whether they fit each other or not; raises NotFound."""
    for line in _read(path):
        parsed = parse_line(line)
        if parsed is not None:
            yield parsed


class _Check:
    """Where a reader of a log stands."""

    def __init__(self) -> None:
        self.head = Head()
        self.notes: list[str] = []
        self._hashes = [self.head.hash]  # of lines so far, by sequence number
        self._number = 0  # of the line that the head stands for
        self._unread: list[bytes] = []  # lines behind that one

    def take(self, number: int, data: bytes) -> None:
        line = parse_line(data)
        if line is None:
            self._unread.append(data)
            return
        if self._unread:
            self._check_torn(line)
        self._check_place(number, line)
        self.head = Head(line.sequence, line_hash(data))
        self._hashes.append(self.head.hash)
        self._number = number

    def end(self, head: Head | None, expected_head: str | None) -> None:
        if expected_head is not None and expected_head not in self._hashes:
            raise CorruptLog(
                f"no line has the hash {expected_head}: the log was replaced, or lines behind "
                f"line {self._number} are missing"
            )
        if head is not None:
            self._check_head(head)
        elif self.head.sequence > 1:
            raise CorruptLog(f"the head is missing: lines behind line {self._number} may be too")
        if torn := unreadable(self._unread):
            self._note_torn(torn)

    def _check_place(self, number: int, line: AuditLine) -> None:
        due = self.head.sequence + 1
        if line.sequence != due:
            raise CorruptLog(
                f"line {number} has sequence number {line.sequence} where {due} was due: lines "
                "were removed, or stand in another order"
            )
        if line.previous != self.head.hash:
            raise CorruptLog(
                f"line {self._number} is not the one that line {number} followed: it was changed"
                if self._number
                else f"line {number} does not begin the log"
            )

    def _check_torn(self, line: AuditLine) -> None:
        torn = unreadable(self._unread)
        if line.event != TORN or line.details.get("sha256") != line_hash(torn):
            raise CorruptLog(f"line {self._number + 1} cannot be read: it was changed or added")
        self._note_torn(torn)
        self._unread.clear()

    def _note_torn(self, torn: bytes) -> None:
        self.notes.append(f"line {self._number + 1} was cut off after {len(torn)} bytes")

    def _check_head(self, head: Head) -> None:
        if head.sequence > self.head.sequence:
            num_missing = head.sequence - self.head.sequence
            raise CorruptLog(
                f"from line {self._number + 1} on, {num_missing} lines are missing or were changed"
            )
        if self._hashes[head.sequence] != head.hash:
            raise CorruptLog(f"line {self._number} is not the one that was written last")
        if head.sequence < self.head.sequence:
            num_newer = self.head.sequence - head.sequence
            self.notes.append(f"the head is {num_newer} lines behind: a writer died")


def _read(path: Path) -> list[bytes]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise NotFound(f"there is no audit log at {path}") from None
    return lines if lines[-1] else lines[:-1]
