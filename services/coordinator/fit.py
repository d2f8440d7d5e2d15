"""Whether the stages that answered make one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.v1 import stage_pb2

from core.errors import ProtocolViolation
from core.pipeline.events import PipelineFacts, StageFacts

# What all stages of a pipeline must say alike.
_COMMON = (
    "model",
    "model_digest",
    "num_layers",
    "hidden_size",
    "vocab_size",
    "context_length",
    "number_format",
    "codec",
    "kv_block_size",
    "numerics_fingerprint",
    "eos_token_ids",
)


def check_fit(stages: Sequence[stage_pb2.StageReady]) -> None:
    """Raises ProtocolViolation, naming the stage and both values, unless the stages hold all
    layers of one model, in order, in one arithmetic."""
    first = stages[0]
    end = 0
    for index, stage in enumerate(stages):
        for name in _COMMON:
            mine, theirs = _value(stage, name), _value(first, name)
            if mine != theirs:
                raise ProtocolViolation(
                    f"stage {index} does not fit stage 0: {name} is {mine!r}, not {theirs!r}"
                )
        if stage.first_layer != end or stage.end_layer <= stage.first_layer:
            raise ProtocolViolation(
                f"stage {index} holds layers {stage.first_layer}:{stage.end_layer}; "
                f"layer {end} should be its first"
            )
        if stage.num_kv_blocks < 1 or stage.max_rows < 1:
            raise ProtocolViolation(
                f"stage {index} has {stage.num_kv_blocks} KV blocks and takes "
                f"{stage.max_rows} rows; both must be at least 1"
            )
        end = stage.end_layer
    if end != first.num_layers:
        raise ProtocolViolation(f"the stages hold layers 0:{end}, the model has {first.num_layers}")


def pipeline_facts(stages: Sequence[stage_pb2.StageReady], *, num_slots: int) -> PipelineFacts:
    """What the scheduler must know of stages that fit."""
    return PipelineFacts(
        stages=tuple(
            StageFacts(num_kv_blocks=stage.num_kv_blocks, max_rows=stage.max_rows)
            for stage in stages
        ),
        num_slots=num_slots,
        context_length=stages[0].context_length,
        kv_block_size=stages[0].kv_block_size,
        eos_token_ids=tuple(stages[0].eos_token_ids),
        weights=f"{stages[0].model_digest} {stages[0].numerics_fingerprint}",
    )


def _value(stage: stage_pb2.StageReady, name: str) -> Any:
    value = getattr(stage, name)
    return list(value) if name == "eos_token_ids" else value
