"""`penstock update` of a mesh under test: the updater itself, and what stands for a supervisor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from penstock.v1 import generation_pb2_grpc, local_pb2

from services.common.channels import open_channel
from services.local.running_mesh import RunningMesh
from services.local.update import Update, Updater
from tests.chaos.mesh import ChaosMesh
from tests.chaos.trial import Trial


async def update(mesh: ChaosMesh, *, stage_index: int) -> None:
    """Gives a stage the weights of the next model; returns when all its replicas have them."""
    version = (mesh.versions[stage_index] + 1) % len(mesh.shape.models)
    supervisor = _Supervisor(mesh, version=version)
    change = Update(stage_index=stage_index, model_path=Path(mesh.shape.models[version]))
    async with running(mesh, supervisor) as it:
        await Updater(change, it).run()


@asynccontextmanager
async def running(mesh: ChaosMesh, supervisor: Any) -> AsyncIterator[RunningMesh]:
    """The mesh as those see it who change it while it runs."""
    await mesh.mesh()
    async with open_channel(mesh.parts["gateway-0"].command.address) as gateway:
        yield RunningMesh(
            coordinators=mesh.coordinators,
            supervisor=supervisor,
            gateway=generation_pb2_grpc.GenerationServiceStub(gateway),
            key=None,
            say=lambda line: None,
        )


class _Supervisor:
    """As the stub of a supervisor's service that starts parts of the mesh."""

    def __init__(self, mesh: ChaosMesh, *, version: int) -> None:
        self._mesh = mesh
        self._version = version

    def TryReplica(self, request: local_pb2.TryReplicaRequest) -> Trial:
        return Trial(self._start(request))

    async def KeepReplica(self, request: local_pb2.KeepReplicaRequest, **_: Any) -> None:
        """It is kept anyway."""

    async def StopReplica(self, request: local_pb2.StopReplicaRequest, **_: Any) -> None:
        await self._mesh.remove_replica(request.address)

    async def _start(
        self, request: local_pb2.TryReplicaRequest
    ) -> list[local_pb2.TryReplicaResponse]:
        replica = await self._mesh.add_replica(
            request.stage_index, is_spare=request.spare, version=self._version
        )
        return [local_pb2.TryReplicaResponse(address=replica.address, name=replica.name)]
