"""What a coordinator is told of replicas, on its command line and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import InvalidInput
from services.coordinator.roster import Roster, parse_roster, read_roster


@pytest.mark.parametrize(
    ("stages", "spares", "field"),
    [
        ("", "", "stages"),
        ("a:1,a:1", "", "stages"),
        ("a:1|", "", "stages"),
        ("a:1,", "", "stages"),
        ("a:1", "b:1", "spares"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(stages: str, spares: str, field: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{field} is "):
        parse_roster(stages, spares)


def test_stages_part_by_commas_and_replicas_by_bars() -> None:
    roster = parse_roster("h:1|h:2, h:3", "h:2")
    assert roster == Roster(stages=(("h:1", "h:2"), ("h:3",)), spares=frozenset({"h:2"}))


def test_a_file_has_what_was_written(tmp_path: Path) -> None:
    roster = parse_roster("h:1|h:2,h:3", "h:2")
    (tmp_path / "stages.json").write_text(roster.to_json())
    assert read_roster(tmp_path / "stages.json") == roster


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"stages": 1, "spares": []}', '{"stages": [], "spares": []}']
)
def test_a_file_that_has_no_roster_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(InvalidInput):
        read_roster(tmp_path / "stages.json")
    with pytest.raises(InvalidInput, match="stages_file"):
        read_roster(tmp_path / "none.json")
