"""SupervisorService: RPCs to and from the supervisor, on a socket in the run folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.v1 import local_pb2, local_pb2_grpc

from core.errors import Unavailable
from services.common.credentials import Credentials
from services.common.servers import add_port, create_server
from services.common.telemetry import start_telemetry
from services.local.process import MeshProcess

if TYPE_CHECKING:
    from services.local.supervisor import Supervisor


async def serve_supervisor(
    supervisor: Supervisor,
    path: Path,
    *,
    credentials: Credentials | None = None,
    say: Callable[[str], None],
) -> None:
    """Serves at `path` until cancelled. Where the path is too long for a socket it says so: then
    the mesh serves, and cannot be changed."""
    telemetry = start_telemetry("penstock-supervisor", metrics_port=None)
    server = create_server(telemetry, credentials=credentials)
    local_pb2_grpc.add_SupervisorServiceServicer_to_server(SupervisorServicer(supervisor), server)
    try:
        add_port(server, f"unix:{path}", credentials=credentials)
        await server.start()
    except RuntimeError as error:
        say(f"this mesh cannot be updated while it runs: {error}")
    try:
        await asyncio.Event().wait()
    finally:
        await server.stop(None)
        telemetry.shutdown()


class SupervisorServicer(local_pb2_grpc.SupervisorServiceServicer):
    """See local.proto."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def TryReplica(
        self, request: local_pb2.TryReplicaRequest, context: Any
    ) -> AsyncIterator[local_pb2.TryReplicaResponse]:
        process = await self._supervisor.try_replica(
            request.stage_index, model_path=request.model_path, is_spare=request.spare
        )
        address = process.command.address
        try:
            yield local_pb2.TryReplicaResponse(address=address, name=process.name)
            await process.wait()
            if self._supervisor.is_on_trial(address):
                raise Unavailable(_last_words(process))
        finally:
            await self._supervisor.end_trial(address)

    async def KeepReplica(
        self, request: local_pb2.KeepReplicaRequest, context: Any
    ) -> local_pb2.KeepReplicaResponse:
        self._supervisor.keep_replica(request.address)
        return local_pb2.KeepReplicaResponse()

    async def TryCut(
        self, request: local_pb2.TryCutRequest, context: Any
    ) -> AsyncIterator[local_pb2.TryCutResponse]:
        recut = self._supervisor.begin_recut(request.split)
        processes = []
        try:
            for one in recut.new:
                process = await self._supervisor.start_new(recut, one)
                processes.append(process)
                yield local_pb2.TryCutResponse(
                    stage_index=one.stage_index,
                    address=one.replica.address,
                    name=process.name,
                    spare=one.replica.is_spare,
                    num_processes=len(recut.new),
                )
            ended = await _first_to_end(processes)
            if self._supervisor.is_recut_on_trial(recut):
                raise Unavailable(_last_words(ended))
        finally:
            await self._supervisor.end_recut(recut)

    async def KeepCut(
        self, request: local_pb2.KeepCutRequest, context: Any
    ) -> local_pb2.KeepCutResponse:
        recut = self._supervisor.keep_recut(request.split)
        return local_pb2.KeepCutResponse(leaving=sorted(recut.leaving))

    async def StopReplica(
        self, request: local_pb2.StopReplicaRequest, context: Any
    ) -> local_pb2.StopReplicaResponse:
        await self._supervisor.stop_replica(request.address)
        return local_pb2.StopReplicaResponse()


async def _first_to_end(processes: Sequence[MeshProcess]) -> MeshProcess:
    waits = {asyncio.create_task(process.wait()): process for process in processes}
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return waits[done.pop()]


def _last_words(process: MeshProcess) -> str:
    return f"{process.name} ended: {process.last_words()} (log: {process.log_path})"
