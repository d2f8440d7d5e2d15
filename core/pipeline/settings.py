"""Bounds of one pipeline's scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import InvalidInput
from core.pipeline.policy import PolicySettings
from core.pipeline.speculation import SpeculationSettings


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Bounds of one pipeline's scheduler."""

    max_waiting: int = 1024  # requests in the queue; of one more, one is refused
    # A path on which nothing returns for so long has hung; from measured times it is known sooner.
    micro_batch_timeout_s: float = 10.0
    lost_retry_s: float = 2.0  # retry delay of those refused because the pipeline is down
    lost_limit_s: float = 30.0  # how long requests wait for a path when there is none
    shares_prefixes: bool = True  # requests that begin alike share what was computed for it
    # Shares of tenants in what is admitted; 1 for those that are not named.
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    policy: PolicySettings = field(default_factory=PolicySettings)
    speculation: SpeculationSettings = field(default_factory=SpeculationSettings)

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise InvalidInput("max_waiting", self.max_waiting, "at least 1")
        if not self.micro_batch_timeout_s > 0:
            raise InvalidInput("micro_batch_timeout_s", self.micro_batch_timeout_s, "above 0")
        if not self.lost_limit_s >= 0:
            raise InvalidInput("lost_limit_s", self.lost_limit_s, "0 or more")
        for tenant, weight in self.tenant_weights.items():
            if not 0 < weight < float("inf"):
                raise InvalidInput(f"tenant_weights[{tenant!r}]", weight, "a number above 0")
