"""Which tests may be skipped in a run that decides whether a change is taken."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest


def read_allowed(path: Path) -> list[str]:
    """Patterns of reasons, one a line; `*` stands for anything. Lines with # are comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def unexpected(skipped: Iterable[pytest.TestReport], allowed: Iterable[str]) -> list[str]:
    """One line for each skipped test whose reason no pattern matches."""
    patterns = list(allowed)
    return [
        f"{report.nodeid}: {reason(report)}"
        for report in skipped
        if not any(fnmatchcase(reason(report), pattern) for pattern in patterns)
    ]


def reason(report: pytest.TestReport) -> str:
    """Why a test was skipped; an expected failure counts as its reason, too."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(getattr(report, "wasxfail", report.longrepr))
