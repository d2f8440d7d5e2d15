"""Cuts a model's layers into stages so that the slowest stage is as fast as can be.

Stages are contiguous, so that dynamic programming over cut points is exact. Among the cuts
with the smallest slowest stage, the one with the smallest sum of squares is taken: the other
stages are even, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from core.errors import InvalidInput, PlanImpossible
from core.pipeline.costs import ModelCosts
from core.pipeline.plan import PipelinePlan, PlannedStage, StageSlice

_MIB = 1024 * 1024
_INFINITY = float("inf")


@dataclass(frozen=True, kw_only=True)
class Node:
    """Where a stage runs."""

    speed: float = 1.0  # relative: twice as fast is 2
    memory_bytes: int | None = None  # for weights and KV cache; None: no limit

    def __post_init__(self) -> None:
        if not self.speed > 0:
            raise InvalidInput("speed", self.speed, "above 0")


def partition(
    costs: ModelCosts,
    *,
    num_stages: int,
    nodes: Sequence[Node] = (),
    min_kv_blocks: int = 0,
    hop_s: float | None = None,
) -> PipelinePlan:
    """Finds the best cut into `num_stages` stages; stage k runs on `nodes[k]`.

    Every stage must hold its weights and `min_kv_blocks` KV blocks. With `hop_s`, a plan is
    refused when one stage fewer would be as fast once the hop is paid. Raises PlanImpossible
    with the numbers, InvalidInput for arguments that make no sense.
    """
    if num_stages < 1:
        raise InvalidInput("num_stages", num_stages, "at least 1")
    if nodes and len(nodes) != num_stages:
        raise InvalidInput("nodes", len(nodes), f"one for each of {num_stages} stages")
    if num_stages > costs.num_layers:
        raise PlanImpossible(
            f"{num_stages} stages for {costs.num_layers} layers: every stage needs one"
        )
    stages = _StageCosts(costs, nodes or (Node(),) * num_stages, min_kv_blocks)
    plan = stages.plan(_best_edges(stages))
    if hop_s is not None and num_stages > 1:
        _refuse_useless_stage(plan, costs, nodes, min_kv_blocks, hop_s)
    return plan


def plan_split(
    costs: ModelCosts,
    slices: Sequence[StageSlice],
    *,
    nodes: Sequence[Node] = (),
    min_kv_blocks: int = 0,
) -> PipelinePlan:
    """Prices a cut that the operator chose; raises PlanImpossible when it does not fit."""
    if nodes and len(nodes) != len(slices):
        raise InvalidInput("nodes", len(nodes), f"one for each of {len(slices)} stages")
    stages = _StageCosts(costs, nodes or (Node(),) * len(slices), min_kv_blocks)
    for index, part in enumerate(slices):
        needed = stages.bytes(part.first_layer, part.end_layer)
        limit = stages.nodes[index].memory_bytes
        if limit is not None and needed > limit:
            raise PlanImpossible(
                f"stage {index} (layers {part.first_layer}:{part.end_layer}) needs "
                f"{_mib(needed)}, its node has {_mib(limit)}"
            )
    return stages.plan([0, *(part.end_layer for part in slices)])


def parse_split(text: str, *, num_layers: int) -> tuple[StageSlice, ...]:
    """Reads "0:14,14:30"; raises InvalidInput unless the parts cover all layers in order."""
    allowed = f"FIRST:END,FIRST:END,... covering 0:{num_layers} without gaps"
    slices: list[StageSlice] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", part, re.ASCII)
        if match is None:
            raise InvalidInput("split", text, allowed)
        first, end = int(match[1]), int(match[2])
        expected = slices[-1].end_layer if slices else 0
        if first != expected or end <= first:
            raise InvalidInput("split", text, allowed)
        slices.append(StageSlice(first_layer=first, end_layer=end, num_layers=num_layers))
    if slices[-1].end_layer != num_layers:
        raise InvalidInput("split", text, allowed)
    return tuple(slices)


class _StageCosts:
    """Seconds and bytes of any run of layers on any node, in constant time."""

    def __init__(self, costs: ModelCosts, nodes: Sequence[Node], min_kv_blocks: int) -> None:
        self.costs = costs
        self.nodes = nodes
        self._seconds = list(accumulate(costs.layer_s, initial=0.0))
        self._weights = list(accumulate(costs.layer_bytes, initial=0))
        self._kv = [min_kv_blocks * size for size in accumulate(costs.kv_block_bytes, initial=0)]

    def seconds(self, stage: int, first: int, end: int) -> float:
        """Infinite where the stage does not fit its node."""
        node = self.nodes[stage]
        if node.memory_bytes is not None and self.bytes(first, end) > node.memory_bytes:
            return _INFINITY
        seconds = self._seconds[end] - self._seconds[first]
        if first == 0:
            seconds += self.costs.embedding_s
        if end == self.costs.num_layers:
            seconds += self.costs.head_s
        return seconds / node.speed

    def weights_bytes(self, first: int, end: int) -> int:
        size = self._weights[end] - self._weights[first]
        if first == 0:
            size += self.costs.embedding_bytes
        if end == self.costs.num_layers:
            size += self.costs.head_bytes
        return size

    def kv_bytes(self, first: int, end: int) -> int:
        return self._kv[end] - self._kv[first]

    def bytes(self, first: int, end: int) -> int:
        return self.weights_bytes(first, end) + self.kv_bytes(first, end)

    def plan(self, edges: Sequence[int]) -> PipelinePlan:
        spans = list(pairwise(edges))
        seconds = [self.seconds(stage, *span) for stage, span in enumerate(spans)]
        slowest = max(seconds) or 1.0
        return PipelinePlan(
            stages=tuple(
                PlannedStage(
                    stage_slice=StageSlice(
                        first_layer=first, end_layer=end, num_layers=self.costs.num_layers
                    ),
                    seconds=seconds[stage],
                    time_share=seconds[stage] / slowest,
                    weights_bytes=self.weights_bytes(first, end),
                    kv_bytes=self.kv_bytes(first, end),
                )
                for stage, (first, end) in enumerate(spans)
            )
        )


def _best_edges(stages: _StageCosts) -> list[int]:
    """Cut points with the smallest slowest stage; among those, the most even ones."""
    bottleneck_s, _ = _solve(stages, price=lambda seconds: seconds, combine=max)
    if bottleneck_s == _INFINITY:
        raise PlanImpossible(_why_nothing_fits(stages))
    limit_s = bottleneck_s * (1 + 1e-12)

    def square(seconds: float) -> float:
        return seconds * seconds if seconds <= limit_s else _INFINITY

    return _solve(stages, price=square, combine=lambda left, right: left + right)[1]


def _solve(
    stages: _StageCosts,
    *,
    price: Callable[[float], float],
    combine: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The least combined price over all cuts, and the cut; infinite where none fits."""
    num_layers = stages.costs.num_layers
    best = [0.0] + [_INFINITY] * num_layers  # by number of layers placed so far
    choices: list[list[int]] = []
    for stage in range(len(stages.nodes)):
        following, choice = [_INFINITY] * (num_layers + 1), [-1] * (num_layers + 1)
        for first, so_far in enumerate(best):
            if so_far == _INFINITY:
                continue
            for end in range(first + 1, num_layers + 1):
                total = combine(so_far, price(stages.seconds(stage, first, end)))
                if total < following[end]:
                    following[end], choice[end] = total, first
        best = following
        choices.append(choice)
    edges = [num_layers]
    for choice in reversed(choices):
        edges.append(choice[edges[-1]] if edges[-1] >= 0 else -1)
    return best[num_layers], edges[::-1]


def _why_nothing_fits(stages: _StageCosts) -> str:
    num_layers = stages.costs.num_layers
    limits = [node.memory_bytes for node in stages.nodes]
    held = "unlimited" if None in limits else _mib(sum(limit for limit in limits if limit))
    smallest = min(limit for limit in limits if limit is not None)
    largest_layer = max(stages.bytes(i, i + 1) for i in range(num_layers))
    return (
        f"{num_layers} layers in {len(limits)} stages do not fit: weights and KV cache need "
        f"{_mib(stages.bytes(0, num_layers))} in all, the nodes have {held}; the smallest node "
        f"has {_mib(smallest)}, the largest single layer (with embedding or head) needs "
        f"{_mib(largest_layer)}"
    )


def _refuse_useless_stage(
    plan: PipelinePlan,
    costs: ModelCosts,
    nodes: Sequence[Node],
    min_kv_blocks: int,
    hop_s: float,
) -> None:
    num_stages = len(plan.stages)
    try:
        fewer = partition(
            costs, num_stages=num_stages - 1, nodes=nodes[:-1], min_kv_blocks=min_kv_blocks
        )
    except PlanImpossible:
        return  # needed for its memory
    if plan.bottleneck_s + hop_s >= fewer.bottleneck_s:
        raise PlanImpossible(
            f"stage {num_stages - 1} is useless: {num_stages} stages take "
            f"{1e3 * plan.bottleneck_s:.2f} ms and a hop of {1e3 * hop_s:.2f} ms, "
            f"{num_stages - 1} take {1e3 * fewer.bottleneck_s:.2f} ms"
        )


def _mib(size: int) -> str:
    return f"{size / _MIB:.1f} MiB"
