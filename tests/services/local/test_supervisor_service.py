"""The supervisor's service, over its socket, with processes that compute nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from penstock.v1 import local_pb2
from penstock.v1.local_pb2_grpc import SupervisorServiceStub

from core.errors import PlanImpossible
from core.pipeline.plan import StageSlice
from services.common.channels import open_channel
from services.common.credentials import Credentials
from services.common.data_folder import AUDIT_NAME
from services.coordinator.roster import read_roster
from services.local.layout import CoordinatorLayout, MeshLayout, ReplicaLayout, StageLayout
from services.local.ports import HOST
from services.local.process import ProcessCommand
from services.local.run_folder import RunFolder, find_process
from services.local.supervisor import CheckRoom, Supervisor
from services.local.supervisor_service import serve_supervisor
from tests.support.certificates import write_mesh

DEADLINE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class PartLayout(MeshLayout):
    """A layout whose processes are parts that compute nothing; `model_path` says how they serve."""

    def stage_command(self, index: int, one: ReplicaLayout) -> ProcessCommand:
        return _part(super().stage_command(index, one), one.model_path or "serve")

    def coordinator_command(self, one: CoordinatorLayout) -> ProcessCommand:
        return _part(super().coordinator_command(one), "serve")

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

    def told(self) -> tuple[tuple[str, ...], ...]:
        """What a coordinator would be told that takes the stages over now."""
        return read_roster(self.run_folder.stages_path).stages

    async def try_replica(self, how: str) -> tuple[Any, local_pb2.TryReplicaResponse]:
        trial = self.stub.TryReplica(local_pb2.TryReplicaRequest(stage_index=1, model_path=how))
        return trial, await trial.read()

    async def try_cut(self, split: str) -> tuple[Any, list[local_pb2.TryCutResponse]]:
        trial = self.stub.TryCut(local_pb2.TryCutRequest(split=split))
        started = [await trial.read()]
        while len(started) < started[0].num_processes:
            started.append(await trial.read())
        return trial, started

    def pid(self, name: str) -> int | None:
        """Of the process, if it lives."""
        record = self.run_folder.read()
        assert record is not None
        (one,) = [process for process in record.processes if process.name == name]
        return one.pid if find_process(one) else None

    def kill(self, name: str) -> int:
        """Ends a process by force; returns its id."""
        pid = self.pid(name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return pid


@asynccontextmanager
async def running(
    folder: Path, *, check_room: CheckRoom = lambda slices, layout: None, certs: str = ""
) -> AsyncIterator[Running]:
    run_folder = RunFolder(folder)
    stages = tuple(
        StageLayout(
            first_layer=index,
            end_layer=1 + 2 * index,
            replicas=(ReplicaLayout(number=0, address=f"stage-{index}:0", metrics_port=0),),
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
        threads=1,
        threads_alone=1,
        speculation=0,
        drain_s=0,
        require_keys=False,
        data_folder=str(run_folder.path),
        stages=stages,
        coordinators=(CoordinatorLayout(number=0, address="coordinator:0", metrics_port=0),),
        gateway_address="gateway:0",
        gateway_metrics_port=0,
        certs=certs,
    )
    supervisor = Supervisor(
        layout, run_folder=run_folder, say=lambda _: None, check_room=check_room
    )
    async with asyncio.timeout(DEADLINE_S), supervisor.mesh.running():
        supervisor.write_stages()
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


def can_be_taken(address: str) -> bool:
    """Whether a stranger could listen there."""
    with socket.socket() as stranger:
        try:
            stranger.bind((HOST, int(address.rpartition(":")[2])))
        except OSError:
            return False
        return True


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 (nothing announces a record's change)
        await asyncio.sleep(0.01)


async def test_a_trial_that_nobody_keeps_ends_with_its_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = mesh.names()
        trial, started = await mesh.try_replica("serve")
        assert started.name == "stage-1-b"
        assert "stage-1-b" in mesh.names()
        assert not can_be_taken(started.address)
        trial.cancel()
        await until(lambda: mesh.names() == before)
        await until(lambda: can_be_taken(started.address))


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
        assert mesh.told() == (("stage-0:0",), ("stage-1:0",))
        await mesh.stub.KeepReplica(local_pb2.KeepReplicaRequest(address=started.address))
        assert mesh.told() == (("stage-0:0",), ("stage-1:0", started.address))
        trial.cancel()
        await mesh.stub.StopReplica(local_pb2.StopReplicaRequest(address="stage-1:0"))
        assert sorted(mesh.names()) == ["coordinator", "gateway", "stage-0", "stage-1-b"]
        assert mesh.told() == (("stage-0:0",), (started.address,))


async def test_a_cut_on_trial_that_nobody_keeps_ends_with_its_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = mesh.names()
        trial, started = await mesh.try_cut("0:1,1:2,2:3")
        assert [(one.stage_index, one.name) for one in started] == [
            (1, "stage-1-b"),
            (2, "stage-2"),
        ]
        with pytest.raises(grpc.aio.AioRpcError, match="being moved already"):
            await mesh.try_cut("0:3")
        trial.cancel()
        await until(lambda: mesh.names() == before)
        trial, started = await mesh.try_cut("0:3")
        assert [one.name for one in started] == ["stage-0-b"]
        trial.cancel()


async def test_a_cut_that_is_kept_is_kept_alive_and_what_leaves_is_not(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        trial, started = await mesh.try_cut("0:1,1:2,2:3")
        assert mesh.told() == (("stage-0:0",), ("stage-1:0",))
        kept = await mesh.stub.KeepCut(local_pb2.KeepCutRequest(split="0:1,1:2,2:3"))
        trial.cancel()
        assert list(kept.leaving) == ["stage-1:0"]
        mesh.kill("stage-1")
        await until(lambda: mesh.pid("stage-1") is None)
        new = mesh.kill("stage-2")
        await until(lambda: mesh.pid("stage-2") not in (None, new))
        await until(lambda: mesh.pid("stage-1") is None)
        await mesh.stub.StopReplica(local_pb2.StopReplicaRequest(address="stage-1:0"))
        assert sorted(mesh.names()) == [
            *("coordinator", "gateway", "stage-0", "stage-1-b", "stage-2")
        ]
        assert mesh.told() == (("stage-0:0",), *((one.address,) for one in started))


async def test_a_cut_one_of_whose_processes_dies_on_trial_ends(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = mesh.names()
        trial, _ = await mesh.try_cut("0:1,1:2,2:3")
        mesh.kill("stage-2")
        with pytest.raises(grpc.aio.AioRpcError, match="stage-2 ended"):
            await trial.read()
        assert mesh.names() == before


async def test_stages_that_a_mesh_did_not_begin_with_get_identities(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    write_mesh(certs, "stage/0", "stage/1")
    async with running(tmp_path, certs=str(certs)) as mesh:
        trial, _ = await mesh.try_cut("0:1,1:2,2:3")
        assert Credentials(certs / "stage-2").identity.role == "stage/2"
        assert '"certificate made"' in (tmp_path / AUDIT_NAME).read_text()
        trial.cancel()


async def test_where_no_identity_can_be_made_nothing_is_started(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    write_mesh(certs, "stage/0", "stage/1")
    (certs / "ca.key").unlink()
    async with running(tmp_path, certs=str(certs)) as mesh:
        before = mesh.names()
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="no identity of stage/2"):
                await mesh.try_cut("0:1,1:2,2:3")
        assert mesh.names() == before


async def test_processes_that_do_not_fit_beside_the_others_are_not_started(tmp_path: Path) -> None:
    def refuse(slices: Sequence[StageSlice], layout: MeshLayout) -> None:
        raise PlanImpossible(f"too little memory for {len(slices)} more")

    async with running(tmp_path, check_room=refuse) as mesh:
        before = mesh.names()
        for start in (mesh.try_cut("0:1,1:2,2:3"), mesh.try_replica("serve")):
            with pytest.raises(grpc.aio.AioRpcError, match="too little memory") as caught:
                await start
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert mesh.names() == before


async def test_what_is_not_there_is_told_by_its_status(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        calls = (
            (mesh.stub.KeepReplica(local_pb2.KeepReplicaRequest(address="x")), "NOT_FOUND"),
            (mesh.stub.KeepCut(local_pb2.KeepCutRequest(split="0:3")), "NOT_FOUND"),
            (mesh.try_cut("0:1,1:3"), "INVALID_ARGUMENT"),
            (mesh.try_cut("0:1"), "INVALID_ARGUMENT"),
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
