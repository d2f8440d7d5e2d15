"""The short version of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.conftest import TINY
from tests.chaos.mesh import Shape
from tests.chaos.soak import KINDS, soak

SEED = 1
SECONDS = 60.0


@pytest.mark.timeout(240)
async def test_every_request_ends_in_one_way_and_nothing_is_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    shape = Shape(models=(tiny_model,), num_replicas=2, seed=SEED)
    report = await soak(shape, vocab_size=TINY.vocab_size, seconds=SECONDS, folder=tmp_path)
    assert report.problems == []
    assert {kind for kind, _ in report.endings} == {kind.name for kind in KINDS}
    assert report.faults
