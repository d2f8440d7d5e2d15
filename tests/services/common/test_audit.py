"""The audit log: whatever is done to it afterwards, `verify` names the line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import CorruptLog, NotFound, Unavailable
from services.common.audit import NO_LINE, TORN, AuditLog, head_path, line_hash, read_head
from services.common.audit_check import read_lines, verify
from services.common.audit_trail import AuditTrail

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "audit.jsonl"


@pytest.fixture
def log(path: Path) -> AuditLog:
    """A log of five lines."""
    log = AuditLog(path, clock=lambda: 1.5e9)
    for number in range(1, 6):
        log.record("key created", "user ada", key_id=str(number))
    return log


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def write_lines(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def test_a_line_says_who_did_what_when_and_what_came_before(log: AuditLog) -> None:
    first, second = lines_of(log.path)[:2]
    assert json.loads(second) == {
        "sequence": 2,
        "time": "2017-07-14T02:40:00.000+00:00",
        "actor": "user ada",
        "event": "key created",
        "details": {"key_id": "2"},
        "previous": line_hash(first),
    }
    assert json.loads(first)["previous"] == NO_LINE


def test_a_whole_log_is_verified_and_shows_its_head(log: AuditLog) -> None:
    verdict = verify(log.path)
    assert verdict.head == read_head(log.path)
    assert (verdict.head.sequence, verdict.notes) == (5, ())
    assert [line.details["key_id"] for line in read_lines(log.path)] == list("12345")


def removed(lines: list[bytes]) -> list[bytes]:
    return lines[:2] + lines[3:]


def changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b"ada", b"eve"), *lines[3:]]


def garbled(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b"?", *lines[3:]]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[3], lines[2], lines[4]]


def added(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2], *lines[2:]]


def without_the_first(lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def with_the_last_changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[4].replace(b"ada", b"eve")]


def with_the_last_garbled(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], b"?"]


def truncated(lines: list[bytes]) -> list[bytes]:
    return lines[:3]


def emptied(lines: list[bytes]) -> list[bytes]:
    return []


TAMPERINGS = [
    (removed, "line 3 "),
    (changed, "line 3 "),
    (garbled, "line 3 "),
    (swapped, "line 3 "),
    (added, "line 4 "),
    (without_the_first, "line 1 "),
    (with_the_last_changed, "line 5 "),
    (with_the_last_garbled, "line 5 "),
    (truncated, "line 4 on, 2 lines"),
    (emptied, "line 1 on, 5 lines"),
]


@pytest.mark.parametrize("is_continued", [False, True])
@pytest.mark.parametrize(
    ("tamper", "named"), TAMPERINGS, ids=[tamper.__name__ for tamper, _ in TAMPERINGS]
)
def test_tampering_is_found_where_it_was_done(
    log: AuditLog,
    tamper: Callable[[list[bytes]], list[bytes]],
    named: str,
    is_continued: bool,
) -> None:
    write_lines(log.path, tamper(lines_of(log.path)))
    if is_continued:  # a later line must not close the gap
        log.record("key revoked", "user ada")
        named = named.split(" on")[0]
    with pytest.raises(CorruptLog, match=named):
        verify(log.path)


def test_a_log_without_its_head_is_not_whole(log: AuditLog) -> None:
    head_path(log.path).unlink()
    with pytest.raises(CorruptLog, match="head is missing"):
        verify(log.path)


def test_a_head_kept_elsewhere_finds_a_log_and_a_head_that_were_both_replaced(
    log: AuditLog,
) -> None:
    kept = verify(log.path).head.hash
    log.record("key revoked", "user ada")
    verify(log.path, expected_head=kept)
    log.path.unlink()
    head_path(log.path).unlink()
    for _ in range(6):
        log.record("nothing happened", "user eve")
    verify(log.path)
    with pytest.raises(CorruptLog, match=kept):
        verify(log.path, expected_head=kept)


@pytest.mark.parametrize("kept", [1, 100, 3000])
def test_a_line_that_was_cut_off_is_tolerated_and_told(log: AuditLog, kept: int) -> None:
    log.record("long", "user ada", words="x" * 10_000)
    whole = lines_of(log.path)
    # Its writer died before the rest, and before the head.
    log.path.write_bytes(b"".join(line + b"\n" for line in whole[:5]) + whole[5][:kept])
    head = {"sequence": 5, "hash": line_hash(whole[4])}
    head_path(log.path).write_text(json.dumps(head))
    assert verify(log.path).notes == (f"line 6 was cut off after {kept} bytes",)
    log.record("key revoked", "user ada")
    verdict = verify(log.path)
    assert verdict.notes == (f"line 6 was cut off after {kept} bytes",)
    assert [line.event for line in read_lines(log.path)][5:] == [TORN, "key revoked"]
    lines = lines_of(log.path)
    write_lines(log.path, [*lines[:5], *lines[6:]])  # the piece is a part of the log
    verify(log.path)
    write_lines(log.path, [*lines[:5], lines[5] + b"x", *lines[6:]])
    with pytest.raises(CorruptLog, match="line 6"):
        verify(log.path)


def test_a_line_without_its_end_is_a_line(log: AuditLog) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-1])
    assert verify(log.path).head.sequence == 5
    log.record("key revoked", "user ada")
    assert (verify(log.path).head.sequence, verify(log.path).notes) == (6, ())


def test_a_writer_that_died_before_the_head_leaves_a_note_until_the_next(log: AuditLog) -> None:
    before = head_path(log.path).read_bytes()
    log.record("key revoked", "user ada")
    head_path(log.path).write_bytes(before)
    assert verify(log.path).notes == ("the head is 1 lines behind: a writer died",)
    log.record("key revoked", "user ada")
    assert verify(log.path).notes == ()


def test_many_processes_and_threads_append_to_one_chain(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from services.common.audit import AuditLog\n"
        "for n in range(20): AuditLog(Path(sys.argv[1])).record('e', sys.argv[2], n=n)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(number)], cwd=ROOT)
        for number in range(3)
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: AuditLog(path).record("e", "thread", n=n), range(20)))
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert verify(path).head.sequence == 80
    for actor in ("0", "1", "2"):
        assert [x.details["n"] for x in read_lines(path) if x.actor == actor] == list(range(20))


def test_it_is_for_its_owner_only(log: AuditLog) -> None:
    paths = (log.path.parent, log.path, head_path(log.path))
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o600, 0o600]


def test_what_a_line_quotes_stays_in_the_line(path: Path) -> None:
    AuditLog(path).record("e", "eve\n{}", word="\u2028 \x1b[2J \ud800")
    (line,) = read_lines(path)
    assert (line.actor, line.details["word"]) == ("eve\n{}", "\u2028 \x1b[2J \ud800")
    assert path.read_bytes().count(b"\n") == 1
    assert b"\x1b" not in path.read_bytes()


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"audit\.jsonl"):
        AuditLog(tmp_path / "file" / "audit.jsonl").record("e", "ada")


def test_no_log_is_not_a_whole_log(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        verify(tmp_path / "audit.jsonl")


def test_a_trail_writes_in_order_and_has_written_once_it_is_closed(path: Path) -> None:
    trail = AuditTrail(path)
    for number in range(10):
        trail.record("e", "ada", n=number)
    trail.close()
    assert [line.details["n"] for line in read_lines(path)] == list(range(10))


def test_a_trail_to_nowhere_writes_nothing(tmp_path: Path) -> None:
    trail = AuditTrail(None)
    trail.record("e", "ada")
    trail.close()
    assert os.listdir(tmp_path) == []


def test_a_trail_that_cannot_write_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    trail = AuditTrail(tmp_path / "file" / "audit.jsonl")
    trail.record("key created", "ada")
    trail.close()
    assert "an event could not be recorded" in caplog.text
