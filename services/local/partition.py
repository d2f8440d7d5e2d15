"""Which layers each stage of a local mesh holds, and what that takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from core.engine.engine import kv_bytes_per_block
from core.errors import InvalidInput
from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import ModelSizes
from core.pipeline.plan import StageSlice
from services.local.settings import MeshSettings, parse_split

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage and its estimated sizes."""

    slice: StageSlice
    weights_bytes: int
    kv_block_bytes: int


def plan_stages(
    settings: MeshSettings, config: LlamaConfig, sizes: ModelSizes
) -> tuple[PlannedStage, ...]:
    """Raises InvalidInput or PlanImpossible."""
    count = config.num_layers
    if settings.split is not None:
        pairs = parse_split(settings.split)
    else:
        edges = [round(i * count / settings.stages) for i in range(settings.stages + 1)]
        pairs = tuple(itertools.pairwise(edges))
    if [pairs[0][0], *(end for _, end in pairs)] != [first for first, _ in pairs] + [count]:
        raise InvalidInput("split", settings.split, f"adjoining runs from 0 to {count}")
    slices = [StageSlice(first_layer=f, end_layer=e, num_layers=count) for f, e in pairs]
    return tuple(
        PlannedStage(
            slice=one,
            weights_bytes=stage_parameters(one, sizes) * ELEMENT_BYTES[settings.dtype],
            kv_block_bytes=kv_bytes_per_block(config, one, settings.dtype),
        )
        for one in slices
    )


def stage_parameters(stage_slice: StageSlice, sizes: ModelSizes) -> int:
    """Parameters that a stage holds; a head tied to the embedding counts on both ends."""
    layers = sizes.layers[stage_slice.first_layer : stage_slice.end_layer]
    parts = list(layers)
    if stage_slice.is_first:
        parts.append(sizes.embedding)
    if stage_slice.is_last:
        parts.append(sizes.head)
    return sum(part.num_parameters for part in parts)
