"""Cuts a model for a local mesh: from its configuration and the user's wishes to a plan."""

from __future__ import annotations

from collections.abc import Sequence

from core.kernels.host_cpu import caches_bytes, integer_instructions
from core.models.llama.config import LlamaConfig
from core.pipeline.costs import DecoderShape, ModelCosts, estimate_costs
from core.pipeline.partitioner import Node, parse_split, partition, plan_split
from core.pipeline.plan import PipelinePlan, StageSlice
from core.wire.codecs import codec_named
from services.local.memory import POSITIONS_PER_BLOCK

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
# A byte, and a float32 scale for 64 of them.
_INT8_WEIGHT_BYTES = 1 + 4 / 64
# 4 bits, and a float16 scale and minimum for 32 of them. Matrices that have more bits in the file
# are int8, such as the head of most files: the estimate takes the layers for 4 bits throughout.
_INT4_WEIGHT_BYTES = 1 / 2 + 4 / 32
_LAYER_BYTES = {"int8": _INT8_WEIGHT_BYTES, "int4": _INT4_WEIGHT_BYTES}


def model_costs(config: LlamaConfig, *, number_format: str) -> ModelCosts:
    """Estimated time and memory of each layer."""
    # Beside weights of integers, everything else is bf16, and the cache int8 where that is fast.
    is_integer = number_format in _LAYER_BYTES
    size = _ELEMENT_BYTES["bf16" if is_integer else number_format]
    has_byte_cache = is_integer and caches_bytes(integer_instructions())
    return estimate_costs(
        DecoderShape(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            query_size=config.num_heads * config.head_dim,
            kv_size=config.num_kv_heads * config.head_dim,
            vocab_size=config.vocab_size,
            bytes_per_weight=_LAYER_BYTES.get(number_format, size),
            bytes_per_head_weight=_INT8_WEIGHT_BYTES if is_integer else size,
            bytes_per_embedding=size,
            bytes_per_kv=1 + 4 / config.head_dim if has_byte_cache else size,
            kv_block_size=POSITIONS_PER_BLOCK,
        )
    )


def stage_block_bytes(
    config: LlamaConfig, slices: Sequence[StageSlice], costs: ModelCosts, *, wire: str
) -> list[int]:
    """Bytes of one KV block in each stage; all but the last keep the rows beside it that they
    sent."""
    sent_bytes = POSITIONS_PER_BLOCK * codec_named(wire).row_bytes(config.hidden_size)
    return [
        sum(costs.kv_block_bytes[part.first_layer : part.end_layer])
        + (0 if part.is_last else sent_bytes)
        for part in slices
    ]


def plan_stages(
    config: LlamaConfig,
    *,
    number_format: str,
    num_stages: int,
    split: str | None = None,
    memory_bytes: tuple[int, ...] = (),
) -> PipelinePlan:
    """The cut that `split` says, or the best one.

    `memory_bytes` is what each stage's node has; with it, every stage must hold its weights
    and the KV blocks of one sequence of full length. Raises InvalidInput, or PlanImpossible
    with the numbers.
    """
    costs = model_costs(config, number_format=number_format)
    nodes = tuple(Node(memory_bytes=size) for size in memory_bytes)
    blocks = -(-config.context_length // POSITIONS_PER_BLOCK)
    if split is not None:
        slices = parse_split(split, num_layers=config.num_layers)
        return plan_split(costs, slices, nodes=nodes, min_kv_blocks=blocks)
    return partition(costs, num_stages=num_stages, nodes=nodes, min_kv_blocks=blocks)
