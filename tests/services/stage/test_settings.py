"""Options that make no sense are refused, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.errors import InvalidInput
from services.stage.settings import StageSettings


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("slow_down", 0.9),
        ("slow_down", float("inf")),
        ("slow_down", float("nan")),
        ("max_rows", 0),
    ],
)
def test_a_value_out_of_range_is_refused(option: str, value: float) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(InvalidInput, match=option):
        StageSettings(
            model=Path("m"), name="tiny", first_layer=0, end_layer=1, listen="", **options
        )
