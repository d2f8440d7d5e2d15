"""How much memory ours may take: 1.5 times the weights, the KV in use, and 400 MB a process."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from core.models.registry import load_config
from core.weights.open import open_checkpoint
from services.local.memory import POSITIONS_PER_BLOCK
from services.local.partition import model_costs
from tests.benchmarks.peers.work import Work

WEIGHT_FACTOR = 1.5
PROCESS_BYTES = 400_000_000
NUM_SERVICES = 2  # gateway and coordinator, beside the stages
# Of quantised formats, without their scales.
BYTES_PER_WEIGHT = {"int8": 1.0, "int4": 0.5}


def memory_limit(model: Path, system: str, works: Sequence[Work], *, stages: int = 2) -> int | None:
    """Bytes, or None for systems without such a goal."""
    number_format = system.removeprefix("penstock ")
    each = BYTES_PER_WEIGHT.get(number_format)
    if each is None:
        return None
    checkpoint = open_checkpoint(model)
    try:
        config = load_config(checkpoint)
        num_weights = sum(prod(checkpoint.shape(name)) for name in checkpoint.tensor_names)
    finally:
        checkpoint.close()
    block_bytes = sum(model_costs(config, number_format=number_format).kv_block_bytes)
    kv_bytes = most_tokens(works) * block_bytes / POSITIONS_PER_BLOCK
    weights = WEIGHT_FACTOR * each * num_weights
    return int(weights + kv_bytes + PROCESS_BYTES * (stages + NUM_SERVICES))


def most_tokens(works: Sequence[Work]) -> int:
    """The most tokens that are held at a time."""
    return max(work.streams * (work.num_prompt_tokens + work.num_new_tokens) for work in works)
