"""Modules stay small and rooms full."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES = 400
SOURCES = [
    path for room in ("core", "services", "tests") for path in sorted((ROOT / room).rglob("*.py"))
]


def test_no_module_has_grown_over_its_limit() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert not {
        str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > MOST_LINES
    }


def test_every_module_of_core_and_services_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tests")
        and (text := path.read_text()).strip()
        and not text.startswith('"""')
    ]
    assert not silent
