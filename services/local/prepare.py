"""Decides everything about a mesh before a process is started: from settings to a layout."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import psutil

from core.models.llama.config import LlamaConfig
from core.models.registry import load_config
from core.pipeline.costs import ModelCosts
from core.pipeline.plan import PipelinePlan
from core.weights.open import open_checkpoint
from core.weights.sealed.identity import SealKeys
from core.wire.codecs import check_wire
from services.common.data_folder import default_data_folder
from services.local.catalogue import CATALOGUE
from services.local.fetch import Report, resolve_model
from services.local.identities import settle_identities
from services.local.layout import CoordinatorLayout, MeshLayout, ReplicaLayout, StageLayout
from services.local.manifests import catalogue_manifest
from services.local.memory import (
    POSITIONS_PER_BLOCK,
    MemoryNeeds,
    choose_kv_blocks,
    packing_bytes,
)
from services.local.number_format import choose_number_format
from services.local.partition import model_costs, plan_stages, stage_block_bytes
from services.local.ports import HOST, HeldPorts, require_free
from services.local.seal_keys import follow_seal, seal_keys
from services.local.settings import MeshSettings
from services.local.threads import choose_threads

# What is in flight when a mesh is told to stop has this long to end.
DRAIN_S = 3


class _Ports(NamedTuple):
    """Of stage processes, of coordinators, and of the gateway."""

    listen: list[int]
    metrics: list[int]


def prepare(
    settings: MeshSettings, *, ports: HeldPorts, report: Report | None = None
) -> MeshLayout:
    """Finds or fetches the model, cuts it, sizes the KV cache and takes ports, which are to be held
    until the mesh holds them itself.

    Raises NotFound (model, certificates), InvalidInput (an option, a port), PlanImpossible (the
    cut, the memory), CorruptWeights, Unavailable or Exhausted (the fetch).
    """
    settings = follow_seal(settings)
    chosen = _choose_ports(settings, ports)
    path = resolve_model(settings.model, report)
    manifest = settings.manifest or catalogue_manifest(settings.model, path)
    keys = seal_keys(path, settings.seal_keys)
    model = read_model(path, dtype=_chosen_dtype(settings), keys=keys)
    check_wire(settings.wire, number_format=model.number_format)
    plan = plan_stages(
        model.config,
        number_format=model.number_format,
        num_stages=settings.num_stages,
        split=settings.split,
    )
    costs = model_costs(model.config, number_format=model.number_format)
    kv_blocks = _choose_kv_blocks(settings, model, plan, costs)
    return MeshLayout(
        model_name=model_name(settings.model, path),
        model_path=str(path),
        number_format=model.number_format,
        device=settings.device,
        wire=settings.wire,
        kv_blocks=kv_blocks,
        prefix_cache=settings.prefix_cache,
        max_sequences=settings.max_sequences,
        max_rows=settings.max_rows,
        **choose_threads(settings)._asdict(),
        speculation=settings.speculation,
        drain_s=DRAIN_S,
        require_keys=settings.require_keys,
        data_folder=str(default_data_folder()),
        stages=_stages(settings, plan, chosen),
        coordinators=_coordinators(settings, chosen),
        gateway_address=f"{HOST}:{chosen.listen[-1]}",
        gateway_metrics_port=chosen.metrics[-1],
        shortcuts=settings.shortcuts,
        certs=settle_identities(settings),
        seal_keys="" if keys is None else str(settings.seal_keys.absolute()),
        rehash_minutes=settings.rehash_minutes,
        manifest="" if manifest is None else str(manifest.absolute()),
    )


def _stages(settings: MeshSettings, plan: PipelinePlan, ports: _Ports) -> tuple[StageLayout, ...]:
    free = iter(zip(ports.listen, ports.metrics, strict=True))
    return tuple(
        StageLayout(
            first_layer=stage.stage_slice.first_layer,
            end_layer=stage.stage_slice.end_layer,
            slow_down=settings.slow_down.get(index, 1.0),
            replicas=tuple(
                ReplicaLayout(
                    number=number,
                    address=f"{HOST}:{listen}",
                    metrics_port=metrics,
                    is_spare=number >= settings.replicas_of(index),
                )
                for number, (listen, metrics) in enumerate(
                    islice(free, settings.processes_of(index))
                )
            ),
        )
        for index, stage in enumerate(plan.stages)
    )


def _coordinators(settings: MeshSettings, ports: _Ports) -> tuple[CoordinatorLayout, ...]:
    first = -1 - settings.coordinators
    pairs = zip(ports.listen[first:-1], ports.metrics[first:-1], strict=True)
    return tuple(
        CoordinatorLayout(number=number, address=f"{HOST}:{listen}", metrics_port=metrics)
        for number, (listen, metrics) in enumerate(pairs)
    )


def _chosen_dtype(settings: MeshSettings) -> str:
    # What is best on a CPU, a GPU may not compute at all.
    return "bf16" if (settings.device, settings.dtype) == ("cuda", "auto") else settings.dtype


class ModelFacts(NamedTuple):
    """A model's sizes, and the number format that it will be computed in."""

    config: LlamaConfig
    number_format: str


def read_model(path: Path, *, dtype: str, keys: SealKeys | None = None) -> ModelFacts:
    """What the headers of a model's file say; raises CorruptWeights. `keys` are those of a sealed
    one."""
    checkpoint = open_checkpoint(path, keys=keys)
    try:
        config = load_config(checkpoint)
        return ModelFacts(config, choose_number_format(dtype, checkpoint, config))
    finally:
        checkpoint.close()


def model_name(spec: str, path: Path) -> str:
    """What requests call the model: its name in the catalogue, else that of file or folder."""
    if any(model.name == spec for model in CATALOGUE):
        return spec
    return path.name if path.is_dir() else path.stem


def _choose_ports(settings: MeshSettings, held: HeldPorts) -> _Ports:
    """The gateway's as asked for, the inner ones free; metrics from the gateway's upwards: then the
    first coordinator's, the stages', and those of further coordinators."""
    num_replicas = sum(map(settings.processes_of, range(settings.num_stages)))
    num_processes = num_replicas + settings.coordinators + 1
    listen, metrics = ([held.take() for _ in range(num_processes)] for _ in range(2))
    if settings.grpc_port:
        require_free("grpc_port", settings.grpc_port)
        listen[-1] = settings.grpc_port
    if settings.metrics_port:
        base = settings.metrics_port
        stages = range(base + 2, base + 2 + num_replicas)
        metrics = [*stages, base + 1, *range(stages.stop, base + num_processes), base]
        for port in sorted(metrics):
            require_free("metrics_port", port)
    return _Ports(listen, metrics)


def _choose_kv_blocks(
    settings: MeshSettings, model: ModelFacts, plan: PipelinePlan, costs: ModelCosts
) -> int:
    config = model.config
    blocks_a_sequence = -(-config.context_length // POSITIONS_PER_BLOCK)
    fp32 = model_costs(config, number_format="fp32")
    processes = [settings.processes_of(index) for index in range(len(plan.stages))]
    blocks = stage_block_bytes(config, plan.slices, costs, wire=settings.wire)
    needs = MemoryNeeds(
        available_bytes=psutil.virtual_memory().available,
        weights_bytes=_sum_of_products(processes, [s.weights_bytes for s in plan.stages]),
        kv_block_bytes=_sum_of_products(processes, blocks),
        packing_bytes=packing_bytes(fp32, num_replicas=sum(processes)),
        num_replicas=sum(processes),
        num_services=settings.coordinators + 1,
        most_blocks=settings.max_sequences * blocks_a_sequence,
    )
    return choose_kv_blocks(needs, kv_memory_bytes=settings.kv_memory_bytes)


def _sum_of_products(counts: Iterable[int], sizes: Iterable[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))
