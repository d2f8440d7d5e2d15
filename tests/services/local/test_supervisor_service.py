"""The supervisor's service, over its socket, with processes that compute nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from penstock.v1 import local_pb2
from penstock.v1.local_pb2_grpc import SupervisorServiceStub

from services.common.channels import open_channel
from services.local.layout import MeshLayout, ReplicaLayout, StageLayout
from services.local.process import ProcessCommand
from services.local.run_folder import RunFolder, find_process
from services.local.supervisor import Supervisor
from services.local.supervisor_service import serve_supervisor

DEADLINE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class PartLayout(MeshLayout):
    """A layout whose processes are parts that compute nothing; `model_path` says how they serve."""

    def stage_command(self, index: int, one: ReplicaLayout) -> ProcessCommand:
        return _part(super().stage_command(index, one), one.model_path or "serve")

    def coordinator_command(self) -> ProcessCommand:
        real = super().coordinator_command()
        return _part(real, "say", real.arguments[real.arguments.index("--stages") + 1])

    def gateway_command(self) -> ProcessCommand:
        return _part(super().gateway_command(), "serve")


def _part(real: ProcessCommand, *how: str) -> ProcessCommand:
    return ProcessCommand(
        name=real.name,
        module="tests.support.part",
        arguments=how,
        address=real.address,
        metrics_port=real.metrics_port,
        stop_turn=real.stop_turn,
    )


@dataclass(frozen=True)
class Running:
    supervisor: Supervisor
    run_folder: RunFolder
    stub: Any

    def names(self) -> list[str]:
        record = self.run_folder.read()
        assert record is not None
        return [process.name for process in record.processes[1:] if find_process(process)]

    async def try_replica(self, how: str) -> tuple[Any, local_pb2.TryReplicaResponse]:
        trial = self.stub.TryReplica(local_pb2.TryReplicaRequest(stage_index=1, model_path=how))
        return trial, await trial.read()


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Running]:
    run_folder = RunFolder(folder)
    stages = tuple(
        StageLayout(
            first_layer=index,
            end_layer=index + 1,
            replicas=(ReplicaLayout(number=0, address=f"stage:{index}", metrics_port=0),),
        )
        for index in range(2)
    )
    layout = PartLayout(
        model_name="m",
        model_path="serve",
        number_format="bf16",
        device="cpu",
        kv_blocks=1,
        prefix_cache=True,
        max_sequences=1,
        max_rows=1,
        speculation=0,
        drain_s=0,
        stages=stages,
        coordinator_address="coordinator:1",
        coordinator_metrics_port=0,
        gateway_address="gateway:1",
        gateway_metrics_port=0,
    )
    supervisor = Supervisor(layout, run_folder=run_folder, say=lambda _: None)
    async with asyncio.timeout(DEADLINE_S), supervisor.mesh.running():
        supervisor.write_record()
        tasks = [
            asyncio.create_task(supervisor.mesh.keep_alive(restarted=supervisor.write_record)),
            asyncio.create_task(
                serve_supervisor(supervisor, run_folder.socket_path, say=pytest.fail)
            ),
        ]
        try:
            async with open_channel(f"unix:{run_folder.socket_path}") as channel:
                await channel.channel_ready()
                yield Running(supervisor, run_folder, SupervisorServiceStub(channel))
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 (nothing announces a record's change)
        await asyncio.sleep(0.01)


async def test_a_trial_that_nobody_keeps_ends_with_its_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = mesh.names()
        trial, started = await mesh.try_replica("serve")
        assert started.name == "stage-1-b"
        assert "stage-1-b" in mesh.names()
        trial.cancel()
        await until(lambda: mesh.names() == before)


async def test_a_trial_tells_the_last_words_of_a_process_that_fails(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        trial, _ = await mesh.try_replica("fail")
        with pytest.raises(grpc.aio.AioRpcError, match="stage-1-b ended: error: no layers left"):
            await trial.read()
        assert "stage-1-b" not in mesh.names()


async def test_a_replica_that_is_kept_takes_the_place_of_one_that_is_stopped(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as mesh:
        trial, started = await mesh.try_replica("serve")
        await mesh.stub.KeepReplica(local_pb2.KeepReplicaRequest(address=started.address))
        trial.cancel()
        await mesh.stub.StopReplica(local_pb2.StopReplicaRequest(address="stage:1"))
        assert sorted(mesh.names()) == ["coordinator", "gateway", "stage-0", "stage-1-b"]
        record = mesh.run_folder.read()
        assert record is not None
        (coordinator,) = [one for one in record.processes if one.name == "coordinator"]
        process = find_process(coordinator)
        assert process is not None
        process.kill()
        log = mesh.run_folder.log_path("coordinator")
        await until(lambda: f"stage:0,{started.address}" in log.read_text())


async def test_what_is_not_there_is_told_by_its_status(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        calls = (
            (mesh.stub.KeepReplica(local_pb2.KeepReplicaRequest(address="x")), "NOT_FOUND"),
            (mesh.stub.StopReplica(local_pb2.StopReplicaRequest(address="x")), "NOT_FOUND"),
            (
                mesh.stub.TryReplica(local_pb2.TryReplicaRequest(stage_index=2)).read(),
                "INVALID_ARGUMENT",
            ),
            (
                mesh.stub.TryReplica(local_pb2.TryReplicaRequest(model_path="a\0b")).read(),
                "INVALID_ARGUMENT",
            ),
            (
                mesh.stub.TryReplica(local_pb2.TryReplicaRequest(model_path="a" * 5000)).read(),
                "INVALID_ARGUMENT",
            ),
        )
        for call, code in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code().name == code
