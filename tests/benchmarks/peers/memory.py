"""How much memory ours may take: 1.5 times the weights, the KV in use, and 400 MB a process."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from core.kernels.host_cpu import has_vnni
from core.models.registry import load_config
from core.weights.open import open_checkpoint
from tests.benchmarks.peers.work import Work

WEIGHT_FACTOR = 1.5
PROCESS_BYTES = 400_000_000
NUM_SERVICES = 2  # gateway and coordinator, beside the stages
# Of quantised formats, without their scales.
BYTES_PER_WEIGHT = {"int8": 1.0, "int4": 0.5}
KV_BYTES = 2.0  # one number of the cache, in bf16


def memory_limit(model: Path, system: str, works: Sequence[Work], *, stages: int = 2) -> int | None:
    """Bytes, or None for systems without such a goal."""
    each = BYTES_PER_WEIGHT.get(system.removeprefix("penstock "))
    if each is None:
        return None
    checkpoint = open_checkpoint(model)
    try:
        config = load_config(checkpoint)
        num_weights = sum(prod(checkpoint.shape(name)) for name in checkpoint.tensor_names)
    finally:
        checkpoint.close()
    numbers = most_tokens(works) * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    # Of int8 where that is fast, a byte and its share of the scale that a head's numbers have.
    kv_bytes = 1 + 4 / config.head_dim if has_vnni() else KV_BYTES
    weights = WEIGHT_FACTOR * each * num_weights
    return int(weights + numbers * kv_bytes + PROCESS_BYTES * (stages + NUM_SERVICES))


def most_tokens(works: Sequence[Work]) -> int:
    """The most tokens that are held at a time."""
    return max(work.streams * (work.num_prompt_tokens + work.num_new_tokens) for work in works)
