"""Whether a mesh fits into this machine, and how much of it the KV cache may take."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput, PlanImpossible

# Of what is free once the weights are loaded; the rest stays with the machine's other work.
KV_SHARE = 0.25
# Interpreter, libraries, compiled kernels, workspaces and buffers of one process; measured
# 90 (coordinator) to 330 MiB (last stage of the default model).
PROCESS_BYTES = 250 * 2**20
POSITIONS_PER_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What is known before anything is loaded. `kv_block_bytes` is one block over all stages."""

    available_bytes: int
    weights_bytes: int
    kv_block_bytes: int
    num_processes: int
    # Blocks beyond which no request could use more.
    most_blocks: int


def choose_kv_blocks(needs: MemoryNeeds, *, kv_memory_bytes: int | None) -> int:
    """How many KV blocks each stage holds.

    Raises PlanImpossible, with the numbers, when the mesh does not fit; InvalidInput when the
    KV memory asked for holds no block.
    """
    fixed_bytes = needs.weights_bytes + needs.num_processes * PROCESS_BYTES
    free_bytes = needs.available_bytes - fixed_bytes
    wanted = int(max(free_bytes, 0) * KV_SHARE) if kv_memory_bytes is None else kv_memory_bytes
    blocks = min(wanted // needs.kv_block_bytes, needs.most_blocks)
    if kv_memory_bytes is not None and blocks < 1:
        smallest = f"{gib(needs.kv_block_bytes)}, one block of {POSITIONS_PER_BLOCK} tokens"
        raise InvalidInput("kv_memory", gib(kv_memory_bytes), f"at least {smallest}")
    if blocks < 1 or blocks * needs.kv_block_bytes > free_bytes:
        kv_bytes = max(kv_memory_bytes or 0, needs.kv_block_bytes)
        raise PlanImpossible(
            f"too little memory: weights {gib(needs.weights_bytes)}, {needs.num_processes} "
            f"processes {gib(needs.num_processes * PROCESS_BYTES)} and KV cache {gib(kv_bytes)} "
            f"need {gib(fixed_bytes + kv_bytes)}, and {gib(needs.available_bytes)} are available"
        )
    return blocks


def gib(size_bytes: int) -> str:
    """A size for messages: GiB, or KiB where that would be zero."""
    if size_bytes < 2**24:
        return f"{size_bytes / 2**10:.0f} KiB"
    return f"{size_bytes / 2**30:.2f} GiB"
