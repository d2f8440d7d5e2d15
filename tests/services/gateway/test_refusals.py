"""However often somebody knocks, the audit log grows by little."""

from __future__ import annotations

from pathlib import Path

from services.common.audit_check import read_lines
from services.common.audit_trail import AuditTrail
from services.gateway.access_interceptor import REFUSAL_INTERVAL_S, Refusals


async def test_refusals_are_one_line_in_a_while_that_counts_them(tmp_path: Path) -> None:
    now = 1000.0
    path = tmp_path / "audit.jsonl"
    trail = AuditTrail(path)
    refusals = Refusals(trail, clock=lambda: now)
    for _ in range(1000):
        refusals.note(method="/a/b", peer="p", why="the first")
    now += REFUSAL_INTERVAL_S
    refusals.note(method="/a/b", peer="p", why="the last")
    trail.close()
    details = [line.details for line in read_lines(path)]
    counts = [(one["why"], one["refusals"]) for one in details]
    assert counts == [("the first", 1), ("the last", 1000)]
