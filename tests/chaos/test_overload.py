"""The short version of the overload in `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.conftest import TINY
from tests.chaos.overload import overload

SECONDS = 8.0


@pytest.mark.timeout(120)
async def test_at_three_times_saturation_what_is_refused_is_told_when_to_come_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    report = await overload(
        tiny_model, vocab_size=TINY.vocab_size, seconds=SECONDS, folder=tmp_path
    )
    assert report.problems == []
