"""Whether a replica that answered makes one model with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import ProtocolViolation
from core.pipeline.cut import Part
from core.pipeline.events import PipelineFacts, ReplicaFacts
from services.coordinator.replica_link import Place

# What all replicas of a mesh must say alike. Weights may differ: see `weights_digest`.
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


class Manifest(NamedTuple):
    """What a replica said when it opened; `name` is for people."""

    place: Place
    ready: stage_pb2.StageReady

    @property
    def name(self) -> str:
        """For people."""
        return self.place.name


def check_fit(
    newcomer: Manifest, others: Sequence[Manifest], *, model: Manifest | None = None
) -> None:
    """Raises ProtocolViolation, naming the replicas and both values, unless the newcomer holds its
    part of the model that the others hold theirs of, and `model` did."""
    _check_sizes(newcomer.name, newcomer.ready)
    if model is not None:
        _check_alike(newcomer, model)
    for other in others:
        _check_alike(newcomer, other)
    if newcomer.place.layers is not None:
        _check_own_layers(newcomer, newcomer.place.layers)
        return
    _check_ends(newcomer)
    for other in others:
        _check_layers(newcomer, other)


def part_of(ready: stage_pb2.StageReady) -> Part:
    """What a replica that fits holds."""
    return Part(ready.first_layer, tuple(ready.layer_digests))


def pipeline_facts(ready: stage_pb2.StageReady, *, num_slots: int) -> PipelineFacts:
    """What the scheduler must know of a model, by any of its replicas."""
    return PipelineFacts(
        num_layers=ready.num_layers,
        num_slots=num_slots,
        context_length=ready.context_length,
        kv_block_size=ready.kv_block_size,
        eos_token_ids=tuple(ready.eos_token_ids),
        vocab_size=ready.vocab_size,
    )


def replica_facts(ready: stage_pb2.StageReady, *, is_spare: bool) -> ReplicaFacts:
    """What the scheduler must know of a replica that fits."""
    return ReplicaFacts(
        num_kv_blocks=ready.num_kv_blocks,
        max_rows=ready.max_rows,
        part=part_of(ready),
        is_spare=is_spare,
        gain_alone=max(ready.threads_alone / max(ready.threads, 1), 1.0),
    )


def _check_sizes(name: str, ready: stage_pb2.StageReady) -> None:
    if ready.end_layer <= ready.first_layer:
        raise ProtocolViolation(f"{name} holds layers {ready.first_layer}:{ready.end_layer}")
    if len(ready.layer_digests) != ready.end_layer - ready.first_layer:
        raise ProtocolViolation(
            f"{name} has digests of {len(ready.layer_digests)} layers, and holds "
            f"{ready.first_layer}:{ready.end_layer}"
        )
    if ready.num_kv_blocks < 1 or ready.max_rows < 1:
        raise ProtocolViolation(
            f"{name} has {ready.num_kv_blocks} KV blocks and takes {ready.max_rows} rows; "
            "both must be at least 1"
        )


def _check_own_layers(newcomer: Manifest, layers: tuple[int, int]) -> None:
    ready = newcomer.ready
    if (ready.first_layer, ready.end_layer) != layers:
        raise ProtocolViolation(
            f"{newcomer.name} does not fit: layers are {ready.first_layer}:{ready.end_layer}, "
            "not {}:{}".format(*layers)
        )


def _check_ends(newcomer: Manifest) -> None:
    name, place, ready = newcomer.name, newcomer.place, newcomer.ready
    if place.stage_index == 0 and ready.first_layer != 0:
        raise ProtocolViolation(f"{name} begins at layer {ready.first_layer}, not at 0")
    if place.stage_index == place.num_stages - 1 and ready.end_layer != ready.num_layers:
        raise ProtocolViolation(
            f"{name} ends at layer {ready.end_layer}; the model has {ready.num_layers}"
        )


def _check_alike(newcomer: Manifest, other: Manifest) -> None:
    for field in _COMMON:
        mine, theirs = _value(newcomer.ready, field), _value(other.ready, field)
        if mine != theirs:
            raise ProtocolViolation(
                f"{newcomer.name} does not fit {other.name}: {field} is {mine!r}, not {theirs!r}"
            )


def _check_layers(newcomer: Manifest, other: Manifest) -> None:
    """Replicas of a stage hold the same layers, and those of the next go on behind them."""
    mine, theirs = newcomer.ready, other.ready
    distance = newcomer.place.stage_index - other.place.stage_index
    fits = {
        0: (mine.first_layer, mine.end_layer) == (theirs.first_layer, theirs.end_layer),
        1: mine.first_layer == theirs.end_layer,
        -1: mine.end_layer == theirs.first_layer,
    }
    if not fits.get(distance, True):
        raise ProtocolViolation(
            f"{newcomer.name} does not fit {other.name}: layers are "
            f"{mine.first_layer}:{mine.end_layer}, beside {theirs.first_layer}:{theirs.end_layer}"
        )


def _value(ready: stage_pb2.StageReady, field: str) -> Any:
    value = getattr(ready, field)
    if field == "codec" and value in tensor_pb2.Codec.values():
        return tensor_pb2.Codec.Name(value)
    return list(value) if field == "eos_token_ids" else value
