"""Which layers each stage holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageSlice:
    """A run of layers: `first_layer` up to, not including, `end_layer`.

    The first stage embeds tokens; the last has the final norm, the head and sampling.
    """

    first_layer: int
    end_layer: int
    num_layers: int  # of the whole model

    @property
    def is_first(self) -> bool:
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        return self.end_layer == self.num_layers


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage of a plan. Costs are the plan's cost model's; only their ratios matter."""

    stage_slice: StageSlice
    seconds: float  # for a typical micro-batch, on its node
    time_share: float  # of the slowest stage's seconds, 0 to 1
    weights_bytes: int
    kv_bytes: int  # for the fewest KV blocks that the plan promises

    @property
    def num_layers(self) -> int:
        return self.stage_slice.end_layer - self.stage_slice.first_layer


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """A model cut into stages, first stage first."""

    stages: tuple[PlannedStage, ...]

    @property
    def slices(self) -> tuple[StageSlice, ...]:
        return tuple(stage.stage_slice for stage in self.stages)

    @property
    def bottleneck_s(self) -> float:
        """Seconds of the slowest stage: the pipeline's pace."""
        return max(stage.seconds for stage in self.stages)

    @property
    def split(self) -> str:
        """As an operator would write it: "0:14,14:30"."""
        return ",".join(f"{s.first_layer}:{s.end_layer}" for s in self.slices)
