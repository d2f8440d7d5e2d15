"""A model as parts that can be held one by one: the layers, the embedding, the head, the rest."""

from __future__ import annotations

import re
from collections.abc import Collection

from core.models.llama.config import LlamaConfig
from core.models.llama.weight_names import NAMINGS
from core.weights.checkpoint import Checkpoint

EMBEDDING, HEAD = "embedding", "head"
# What belongs to no layer, such as rotary frequencies, which are needed with any of them.
SHARED = "shared"
_LAYER_PART = re.compile(r"layer-(\d+)")


def tensor_parts(checkpoint: Checkpoint) -> dict[str, str]:
    """The part that each tensor belongs to."""
    naming = NAMINGS[checkpoint.format]
    before_number = re.escape(naming.layer["q_PH"].partition("{layer}")[0])
    in_layer = re.compile(before_number + r"(\d+)\.")
    others = {naming.embedding: EMBEDDING, naming.final_norm: HEAD, naming.head: HEAD}
    return {
        name: layer_part(int(found[1]))
        if (found := in_layer.match(name))
        else others.get(name, SHARED)
        for name in checkpoint.tensor_names
    }


def slice_parts(config: LlamaConfig, *, first_layer: int, end_layer: int) -> frozenset[str]:
    """The parts that a stage with these layers needs."""
    is_last = end_layer == config.num_layers
    parts = {SHARED, *map(layer_part, range(first_layer, end_layer))}
    if first_layer == 0 or (is_last and config.tied_head):
        parts.add(EMBEDDING)
    if is_last:
        parts.add(HEAD)
    return frozenset(parts)


def granted_layers(parts: Collection[str]) -> tuple[int, int]:
    """The first layer among parts, and one past the last; (0, 0) where there is none."""
    layers = [int(found[1]) for part in parts if (found := _LAYER_PART.fullmatch(part))]
    return (min(layers), max(layers) + 1) if layers else (0, 0)


def layer_part(layer: int) -> str:
    """The name of a layer's part."""
    return f"layer-{layer}"
