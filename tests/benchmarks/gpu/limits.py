"""What no decode on this card can be faster than: reading weights and KV cache once a step."""

from __future__ import annotations

import torch

from core.models.llama.config import LlamaConfig

COPIED_BYTES = 1 << 30
ELEMENT_BYTES = 2  # bfloat16


def copy_bytes_per_s(*, rounds: int = 20) -> float:
    """Bytes read and written in a second by the best of some copies within the card's memory."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best_ms = float("inf")
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        target.copy_(source)
        after.record()
        after.synchronize()
        best_ms = min(best_ms, before.elapsed_time(after))
    return 2 * COPIED_BYTES / (best_ms / 1e3)


def step_bytes(config: LlamaConfig, *, num_sequences: int, mean_context: float) -> float:
    """Bytes of the matrices of all layers and of the head, and of the positions seen."""
    q_size, kv_size = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    per_layer = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    weights = config.num_layers * per_layer + config.vocab_size * config.hidden_size
    positions = config.num_layers * 2 * kv_size * num_sequences * mean_context
    return ELEMENT_BYTES * (weights + positions)
