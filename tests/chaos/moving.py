"""`penstock repartition` of a mesh under test: the mover, and what stands for a supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

from penstock.v1 import local_pb2

from services.local.repartition import Mover, Repartition
from tests.chaos.mesh import ChaosMesh
from tests.chaos.trial import Trial
from tests.chaos.updates import running, update

_POLL_S = 0.02


async def move_layers(mesh: ChaosMesh, *, moves: bool) -> None:
    """Gives the mesh its next cut: two equal stages, three with the first as it is, two others.

    A stage has the weights of one model, so updates come first where stages have those of several.
    `moves`: running sequences leave the old stages at once; else they end there.
    """
    for index, version in enumerate(mesh.versions):
        if version != mesh.versions[0]:
            await update(mesh, stage_index=index)
    change = Repartition(split=",".join(_next_cut(mesh)), moves=moves)
    async with running(mesh, _Supervisor(mesh)) as it:
        await Mover(change, it).run()


@asynccontextmanager
async def layers_moving(mesh: ChaosMesh, *, moves: bool) -> AsyncIterator[None]:
    """As `move_layers`, entered as soon as new sequences take the next cut."""
    before = ",".join(mesh.cut)
    async with asyncio.TaskGroup() as group:
        group.create_task(move_layers(mesh, moves=moves))
        while (now := await mesh.mesh()) is None or now.split == before:  # noqa: ASYNC110 (nothing announces it)
            await asyncio.sleep(_POLL_S)
        yield


def _next_cut(mesh: ChaosMesh) -> list[str]:
    most, half = mesh.num_layers, mesh.num_layers // 2
    edges = ([0, half, most], [0, half, (half + most) // 2, most], [0, max(1, most // 3), most])
    cuts = [[f"{first}:{end}" for first, end in pairwise(ends)] for ends in edges]
    at = cuts.index(mesh.cut) if mesh.cut in cuts else -1
    return cuts[(at + 1) % len(cuts)]


class _Supervisor:
    """As the stub of a supervisor's service that starts parts of the mesh."""

    def __init__(self, mesh: ChaosMesh) -> None:
        self._mesh = mesh

    def TryCut(self, request: local_pb2.TryCutRequest) -> Trial:
        return Trial(self._start(request.split.split(",")))

    async def KeepCut(
        self, request: local_pb2.KeepCutRequest, **_: Any
    ) -> local_pb2.KeepCutResponse:
        self._mesh.keep_cut(request.split.split(","))
        return local_pb2.KeepCutResponse(leaving=[one.address for one in self._mesh.leaving])

    async def StopReplica(self, request: local_pb2.StopReplicaRequest, **_: Any) -> None:
        await self._mesh.remove_replica(request.address)

    async def _start(self, cut: list[str]) -> list[local_pb2.TryCutResponse]:
        """As many processes of each new stage as the mesh began with."""
        shape, version = self._mesh.shape, self._mesh.versions[0]
        replicas = [
            await self._mesh.add_replica(
                index, is_spare=number >= shape.num_replicas, version=version, layers=layers
            )
            for index, layers in enumerate(cut)
            if layers not in self._mesh.cut
            for number in range(shape.num_replicas + shape.num_spares)
        ]
        return [
            local_pb2.TryCutResponse(
                stage_index=one.stage_index,
                address=one.address,
                name=one.name,
                spare=one.is_spare,
                num_processes=len(replicas),
            )
            for one in replicas
        ]
