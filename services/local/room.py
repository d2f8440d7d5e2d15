"""Whether further stage processes fit beside a mesh that runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil

from core.pipeline.costs import ModelCosts
from core.pipeline.plan import StageSlice
from services.local.layout import MeshLayout
from services.local.memory import FurtherNeeds, check_further, packing_bytes
from services.local.partition import model_costs, stage_block_bytes
from services.local.prepare import read_model
from services.local.seal_keys import seal_keys


def check_room(slices: Sequence[StageSlice], layout: MeshLayout) -> None:
    """Raises PlanImpossible, with the numbers, unless a process for each slice of the mesh's model
    fits into the memory that is free now."""
    path = Path(layout.model_path)
    keys = seal_keys(path, Path(layout.seal_keys))
    config, number_format = read_model(path, dtype=layout.number_format, keys=keys)
    costs = model_costs(config, number_format=number_format)
    check_further(
        FurtherNeeds(
            available_bytes=psutil.virtual_memory().available,
            weights_bytes=sum(_weights_bytes(costs, one) for one in slices),
            kv_bytes=layout.kv_blocks
            * sum(stage_block_bytes(config, slices, costs, wire=layout.wire)),
            packing_bytes=packing_bytes(
                model_costs(config, number_format="fp32"), num_replicas=len(slices)
            ),
            num_replicas=len(slices),
        )
    )


def _weights_bytes(costs: ModelCosts, one: StageSlice) -> int:
    return (
        sum(costs.layer_bytes[one.first_layer : one.end_layer])
        + (costs.embedding_bytes if one.is_first else 0)
        + (costs.head_bytes if one.is_last else 0)
    )
