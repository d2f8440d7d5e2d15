"""How many threads of a stage compute together, where all stages share the cores of one machine."""

from __future__ import annotations

import os
from typing import NamedTuple

from services.local.settings import MeshSettings

# The steps of a layer take microseconds in a small model, and have few panels to share: more
# members would meet more than they compute.
MOST_MEMBERS = 8


class Threads(NamedTuple):
    """Of one stage, for a micro-batch."""

    threads: int
    threads_alone: int  # while no other stage computes


def choose_threads(settings: MeshSettings, *, num_cores: int | None = None) -> Threads:
    """As told; or so many that all stages together leave a quarter of the cores to event loops,
    gateway, coordinator and clients, and one alone has all of them.

    `num_cores`: None for those that this process may use. Spares do not count: they compute when
    others have failed.
    """
    if settings.threads is not None:
        return Threads(settings.threads, settings.threads)
    cores = _usable_cores() if num_cores is None else num_cores
    num_replicas = sum(map(settings.replicas_of, range(settings.num_stages)))
    share = cores * 3 // 4 // num_replicas
    return Threads(min(max(1, share), MOST_MEMBERS), min(cores, MOST_MEMBERS))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
