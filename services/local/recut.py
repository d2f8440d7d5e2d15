"""From one cut of a running mesh to another: which stages stay, and which processes are new."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace

from core.errors import InvalidInput, PlanImpossible
from core.pipeline.partitioner import parse_split
from core.pipeline.plan import StageSlice
from services.local.layout import MeshLayout, ReplicaLayout, StageLayout, replica_name
from services.local.ports import HOST, HeldPorts


@dataclass(frozen=True, kw_only=True)
class NewReplica:
    """A process that the new cut has and the old one has not."""

    stage_index: int  # in the new cut
    stage_slice: StageSlice
    replica: ReplicaLayout


@dataclass(frozen=True, kw_only=True)
class Recut:
    """What is to change. Stages of both cuts keep their processes."""

    split: str
    layout: MeshLayout  # afterwards
    new: tuple[NewReplica, ...]
    leaving: frozenset[str]  # addresses


def plan_recut(
    layout: MeshLayout, split: str, *, taken_names: Collection[str], ports: HeldPorts
) -> Recut:
    """A new stage has as many processes, and of these as many spares, as the old one that holds its
    first layer. Where certificates name the stages, one that would become another stage is new.
    What is new listens on ports that `ports` holds.

    Raises InvalidInput where `split` is no cut of the model, PlanImpossible where the layers of a
    stage come from several models, or the wire's codec allows no other cut.
    """
    from core.wire.codecs import codec_named  # most meshes never change

    codec_named(layout.wire).refuse_other_cuts()
    slices = parse_split(split, num_layers=layout.stages[-1].end_layer)
    of_layers = {stage.layers: stage for stage in layout.stages}
    names = set(taken_names)
    stages: list[StageLayout] = []
    new: list[NewReplica] = []
    for index, one in enumerate(slices):
        kept = of_layers.get(f"{one.first_layer}:{one.end_layer}")
        if layout.certs and kept not in layout.stages[index : index + 1]:
            kept = None
        stage = kept or _new_stage(layout, one, index, names, ports)
        stages.append(stage)
        if kept is None:
            new += [
                NewReplica(stage_index=index, stage_slice=one, replica=replica)
                for replica in stage.replicas
            ]
    if not new:
        raise InvalidInput("split", split, "another cut than that of the mesh")
    after = replace(layout, stages=tuple(stages))
    return Recut(
        split=",".join(stage.layers for stage in stages),
        layout=after,
        new=tuple(new),
        leaving=layout.stage_addresses - after.stage_addresses,
    )


def free_number(stage_index: int, names: Collection[str]) -> int:
    """The smallest number whose process has none of these names."""
    return next(n for n in itertools.count() if replica_name(stage_index, n) not in names)


def _new_stage(
    layout: MeshLayout, stage_slice: StageSlice, index: int, names: set[str], ports: HeldPorts
) -> StageLayout:
    """Adds the names of its processes to `names`, and takes their `ports`."""
    first, end = stage_slice.first_layer, stage_slice.end_layer
    sources = [
        stage for stage in layout.stages if stage.first_layer < end and first < stage.end_layer
    ]
    model_path = _common_model(sources, layers=f"{first}:{end}")
    replicas = []
    for old in sources[0].replicas:
        number = free_number(index, names)
        names.add(replica_name(index, number))
        replicas.append(
            ReplicaLayout(
                number=number,
                address=f"{HOST}:{ports.take()}",
                metrics_port=ports.take(),
                is_spare=old.is_spare,
                model_path=model_path,
            )
        )
    return replace(sources[0], first_layer=first, end_layer=end, replicas=tuple(replicas))


def _common_model(sources: list[StageLayout], *, layers: str) -> str:
    paths = {replica.model_path for stage in sources for replica in stage.replicas}
    if len(paths) > 1:
        names = ", ".join(sorted(path or "the mesh's own" for path in paths))
        raise PlanImpossible(f"layers {layers} have weights of several models: {names}")
    return paths.pop()
