"""The short version of `make chaos`: one fault of each kind, at moments that the seed chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import Campaign, choose_rounds, run_campaign
from tests.chaos.conftest import TINY
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.mesh import Shape
from tests.chaos.rounds import Round

SEED = 1
NUM_STREAMS = 16
# Those that end at once, so that all of them fit into the time of CI.
QUICK = tuple(fault for fault in FAULTS if fault.name.endswith(("killed", "cut")))


async def run(
    model: Path, folder: Path, *, replicas: int, faults: tuple[Fault, ...]
) -> list[Round]:
    campaign = Campaign(
        title=f"{replicas} replicas",
        shape=Shape(model=model, num_replicas=replicas, seed=SEED),
        vocab_size=TINY.vocab_size,
        num_streams=NUM_STREAMS,
        rounds=tuple(choose_rounds(faults, count=len(faults), seed=SEED)),
    )
    return await run_campaign(campaign, folder=folder)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("replicas", "faults"), [(1, QUICK), (2, FAULTS)], ids=["one replica", "two replicas"]
)
async def test_no_stream_is_lost_or_changed_whatever_goes_wrong(
    tiny_model: Path, tmp_path: Path, replicas: int, faults: tuple[Fault, ...]
) -> None:
    results = await run(tiny_model, tmp_path, replicas=replicas, faults=faults)
    bad = [one for one in results if one.lost or one.changed or one.recovery_s is None]
    assert bad == []
    assert len(results) == len(faults)
