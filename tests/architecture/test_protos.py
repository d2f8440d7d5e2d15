"""The contract is written down in full: every name in it says what it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos" / "penstock").rglob("*.proto"))
DECLARATION = re.compile(
    r"^\s*(?:(?:service|message|enum|rpc|oneof)\s+\w+"
    r"|(?:optional |repeated )?[\w.<>, ]+\s+\w+\s*=\s*\d+;"
    r"|[A-Z][A-Z0-9_]*\s*=\s*\d+;)"
)


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_every_declaration_has_a_comment_above(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = [
        f"{path.name}:{number}: {line.strip()}"
        for number, line in enumerate(lines[1:], start=2)
        if DECLARATION.match(line) and not lines[number - 2].lstrip().startswith("//")
    ]
    assert not bare


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_durations_use_the_well_known_type(path: Path) -> None:
    numbers = re.compile(r"^\s*(?:optional )?(?:u?int(?:32|64)|float|double)\s+(\w+)", re.MULTILINE)
    names = numbers.findall(path.read_text())
    assert not [
        name for name in names if name.endswith(("_ms", "_seconds", "_duration", "timeout"))
    ]
