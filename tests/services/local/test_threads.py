"""How many threads the stages of a local mesh have."""

from __future__ import annotations

import pytest

from services.local.settings import MeshSettings
from services.local.threads import MOST_MEMBERS, Threads, choose_threads


@pytest.mark.parametrize(
    ("num_cores", "settings", "threads"),
    [
        (1, MeshSettings(), Threads(1, 1)),
        (2, MeshSettings(), Threads(1, 2)),
        (4, MeshSettings(stages=2, spares=(1,)), Threads(1, 4)),
        (6, MeshSettings(stages=2, spares=(1,)), Threads(2, 6)),
        (8, MeshSettings(stages=2, replicas=(1, 2)), Threads(2, 8)),
        (8, MeshSettings(stages=3), Threads(2, 8)),
        (16, MeshSettings(), Threads(6, MOST_MEMBERS)),
        (64, MeshSettings(), Threads(MOST_MEMBERS, MOST_MEMBERS)),
        (2, MeshSettings(threads=3), Threads(3, 3)),
    ],
)
def test_stages_share_three_quarters_of_the_cores_and_one_alone_has_all(
    num_cores: int, settings: MeshSettings, threads: Threads
) -> None:
    assert choose_threads(settings, num_cores=num_cores) == threads
