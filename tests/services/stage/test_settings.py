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
        ("threads", 0),
        ("threads", -1),
        ("threads", 10_000),
        ("threads_alone", 0),
        ("threads_alone", 1025),
        ("rehash_minutes", -1.0),
        ("rehash_minutes", float("nan")),
        ("sealer", Path("owner.pub")),  # without an identity
        ("identity_key", Path("stage-0.key")),  # without a sealer
    ],
)
def test_a_value_out_of_range_is_refused(option: str, value: object) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(InvalidInput, match="sealer" if option == "identity_key" else option):
        StageSettings(
            model=Path("m"), name="tiny", first_layer=0, end_layer=1, listen="", **options
        )
