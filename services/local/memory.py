"""Whether a mesh fits into this machine, and how much of it the KV cache may take."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput, PlanImpossible
from core.pipeline.costs import ModelCosts

# Of what is free once the weights are loaded; the rest stays with the machine's other work.
KV_SHARE = 0.25
# Of a stage beside its weights, its cache and what packing them takes: interpreter and gRPC 50
# MiB, numba with LLVM 65, compiled kernels, workspaces and buffers 80 to 130. So much was left at
# the highest mark of six slices of the default model (bf16, fp32) and Qwen2.5-Coder-0.5B.
STAGE_BYTES = 240 * 2**20
# Of the coordinator (71 MiB measured) and the gateway (110 with a vocabulary of 49,152), each.
SERVICE_BYTES = 100 * 2**20
POSITIONS_PER_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """What is known before anything is loaded. `kv_block_bytes` is one block over all stage
    processes, `packing_bytes` what they all need beside their weights while they load."""

    available_bytes: int
    weights_bytes: int
    packing_bytes: int
    kv_block_bytes: int
    num_replicas: int
    num_services: int  # coordinators and the gateway
    # Blocks beyond which no request could use more.
    most_blocks: int

    @property
    def processes_bytes(self) -> int:
        """Of all processes, whatever the model's weights and its cache take."""
        services_bytes = self.num_services * SERVICE_BYTES
        return self.num_replicas * STAGE_BYTES + services_bytes + self.packing_bytes


def packing_bytes(fp32: ModelCosts, *, num_replicas: int) -> int:
    """What stage processes need for a moment to pack their weights, from the costs in fp32: each
    one float32 layer. Of the embedding and the head they read smaller parts.
    """
    return num_replicas * max(fp32.layer_bytes)


def choose_kv_blocks(needs: MemoryNeeds, *, kv_memory_bytes: int | None) -> int:
    """How many KV blocks each stage holds.

    Raises PlanImpossible, with the numbers, when the mesh does not fit; InvalidInput when the
    KV memory asked for holds no block.
    """
    fixed_bytes = needs.weights_bytes + needs.processes_bytes
    free_bytes = needs.available_bytes - fixed_bytes
    wanted = int(max(free_bytes, 0) * KV_SHARE) if kv_memory_bytes is None else kv_memory_bytes
    blocks = min(wanted // needs.kv_block_bytes, needs.most_blocks)
    if kv_memory_bytes is not None and blocks < 1:
        smallest = f"{gib(needs.kv_block_bytes)}, one block of {POSITIONS_PER_BLOCK} tokens"
        raise InvalidInput("kv_memory", gib(kv_memory_bytes), f"at least {smallest}")
    if blocks < 1 or blocks * needs.kv_block_bytes > free_bytes:
        kv_bytes = max(kv_memory_bytes or 0, needs.kv_block_bytes)
        raise PlanImpossible(
            f"too little memory: weights {gib(needs.weights_bytes)}, "
            f"{needs.num_replicas + needs.num_services} processes {gib(needs.processes_bytes)} "
            f"and KV cache {gib(kv_bytes)} "
            f"need {gib(fixed_bytes + kv_bytes)}, and {gib(needs.available_bytes)} are available"
        )
    return blocks


@dataclass(frozen=True, kw_only=True)
class FurtherNeeds:
    """Of stage processes that are to run beside a mesh that runs already."""

    available_bytes: int
    weights_bytes: int
    kv_bytes: int
    packing_bytes: int
    num_replicas: int


def check_further(needs: FurtherNeeds) -> None:
    """Raises PlanImpossible, with the numbers, unless they fit beside those that run."""
    processes_bytes = needs.num_replicas * STAGE_BYTES + needs.packing_bytes
    all_bytes = needs.weights_bytes + needs.kv_bytes + processes_bytes
    if all_bytes > needs.available_bytes:
        raise PlanImpossible(
            f"too little memory: beside what runs, weights {gib(needs.weights_bytes)}, "
            f"{needs.num_replicas} more processes {gib(processes_bytes)} "
            f"and their KV caches {gib(needs.kv_bytes)} "
            f"need {gib(all_bytes)}, and {gib(needs.available_bytes)} are available"
        )


def gib(size_bytes: int) -> str:
    """A size for messages: GiB, or KiB where that would be zero."""
    if size_bytes < 2**24:
        return f"{size_bytes / 2**10:.0f} KiB"
    return f"{size_bytes / 2**30:.2f} GiB"
