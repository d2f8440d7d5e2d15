"""The short version of `make chaos`, at moments that the seed chooses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.campaigns import Campaign, choose_rounds, run_campaign
from tests.chaos.conftest import TINY
from tests.chaos.faults import find_faults
from tests.chaos.mesh import Shape
from tests.chaos.rounds import Round
from tests.support.models import write_servable

SEED = 1
NUM_STREAMS = 16
# What takes long, and differs little from one of these, is left to the long version.
ALONE = "stage killed,links cut,gateway killed"
WITH_REPLICAS = "stage killed,then killed,links cut,links stall,corrupted,between stages"
WITH_A_STANDBY = "coordinator killed,coordinator frozen,updated"


def campaign(shape: Shape, kinds: str) -> Campaign:
    faults = find_faults(kinds)
    assert len(faults) == kinds.count(",") + 1
    return Campaign(
        title=f"{shape.num_replicas} replicas, {shape.num_coordinators} coordinators",
        shape=shape,
        vocab_size=TINY.vocab_size,
        num_streams=NUM_STREAMS,
        rounds=tuple(choose_rounds(faults, count=len(faults), seed=SEED)),
    )


async def run_all(campaigns: Sequence[Campaign], folder: Path) -> list[Round]:
    """Side by side: most of the time of each is waiting."""
    folders = [folder / str(index) for index in range(len(campaigns))]
    for one in folders:
        one.mkdir()
    runs = [run_campaign(one, folder=own) for one, own in zip(campaigns, folders, strict=True)]
    return [result for results in await asyncio.gather(*runs) for result in results]


@pytest.mark.timeout(300)
async def test_no_stream_is_lost_or_changed_whatever_goes_wrong(
    tiny_model: Path, tmp_path: Path
) -> None:
    other_model = write_servable(tmp_path, replace(TINY, seed=1))
    campaigns = [
        campaign(Shape(models=(tiny_model,), seed=SEED), ALONE),
        campaign(Shape(models=(tiny_model,), num_replicas=2, seed=SEED), WITH_REPLICAS),
        campaign(
            Shape(models=(tiny_model, other_model), num_coordinators=2, seed=SEED), WITH_A_STANDBY
        ),
    ]
    results = await run_all(campaigns, tmp_path)
    bad = [one for one in results if one.lost or one.changed or one.recovery_s is None]
    assert bad == []
    assert len(results) == sum(len(one.rounds) for one in campaigns)
