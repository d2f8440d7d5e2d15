"""The short version of `make chaos`, at moments that the seed chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.campaigns import Campaign, choose_rounds, run_campaign
from tests.chaos.conftest import TINY
from tests.chaos.faults import find_faults
from tests.chaos.mesh import Shape
from tests.chaos.rounds import Round

SEED = 1
NUM_STREAMS = 16
# What takes long, and differs little from one of these, is left to the long version.
ALONE = "stage killed,links cut,coordinator killed,gateway killed"
WITH_REPLICAS = "stage killed,then killed,links cut,links stall,corrupted,coordinator frozen"


async def run(model: Path, folder: Path, *, num_replicas: int, kinds: str) -> list[Round]:
    faults = find_faults(kinds)
    campaign = Campaign(
        title=f"{num_replicas} replicas",
        shape=Shape(models=(model,), num_replicas=num_replicas, seed=SEED),
        vocab_size=TINY.vocab_size,
        num_streams=NUM_STREAMS,
        rounds=tuple(choose_rounds(faults, count=len(faults), seed=SEED)),
    )
    return await run_campaign(campaign, folder=folder)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("num_replicas", "kinds"), [(1, ALONE), (2, WITH_REPLICAS)])
async def test_no_stream_is_lost_or_changed_whatever_goes_wrong(
    tiny_model: Path, tmp_path: Path, num_replicas: int, kinds: str
) -> None:
    results = await run(tiny_model, tmp_path, num_replicas=num_replicas, kinds=kinds)
    bad = [one for one in results if one.lost or one.changed or one.recovery_s is None]
    assert bad == []
    assert len(results) == kinds.count(",") + 1
