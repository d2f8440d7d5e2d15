"""What is under test: a mesh as a user starts it, and two stages that no coordinator drives."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc
import psutil
from penstock.v1.coordinator_pb2 import DrainReplicaRequest
from penstock.v1.local_pb2 import KeepReplicaRequest
from penstock.v1.local_pb2_grpc import SupervisorServiceStub

from services.common.credentials import Credentials
from services.common.identity import name_of, stage_role
from services.local.child import ONE_THREAD
from services.local.run_folder import MeshRecord
from tests.fuzz.rpc.calls import Metadata, open_channel
from tests.fuzz.rpc.methods import RpcMethod, World
from tests.fuzz.rpc.stage_sequences import next_epoch, term_of_now
from tests.support.client import Client, connect
from tests.support.local_mesh import LocalMesh
from tests.support.models import TinyModel, write_servable
from tests.support.stages import ControlStream, HandDrivenCoordinator, micro_batch, start

ROOT = Path(__file__).parents[3]
MODEL = "tiny"
LAYERS = ("0:2", "2:4")
# Orders are those of the first stage, frames those for the last one.
STAGE_CALLED = {"StageService.Control": 0, "StageService.Activate": 1}
# Short, so that requests that say nothing of their length end soon.
CONTEXT_LENGTH = 64
STOP_S = 20.0
ANSWER_S = 60.0
PROMPT = [5, 6, 7, 8]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A process that serves, and where its log lies."""

    name: str
    process: psutil.Process
    log: Path


@dataclass(frozen=True, kw_only=True)
class LoneStage:
    """Satisfies HandDrivenCoordinator."""

    address: str
    serving: Serving


class Servers:
    """Everything that offers RPCs, of parts that ask nobody who they are."""

    coordinator: Credentials | None = None  # that of the coordinator which drives the lone stages

    def __init__(self, mesh: LocalMesh, stages: Sequence[LoneStage]) -> None:
        self.stages = list(stages)
        record = mesh.record
        self._addresses = {
            "gateway": record.gateway,
            "coordinator": record.coordinators[0],
            "supervisor": f"unix:{mesh.run_folder.socket_path}",
        }
        self._mesh_processes = mesh_processes(record)
        stage_addresses = [one.address for one in record.processes if "stage" in one.name]
        self.world = World(model=record.model, stage_addresses=tuple(stage_addresses))
        self._right_answers = {server: self._ask(server) for server in ("gateway", "stage")}

    def address(self, method: RpcMethod) -> str:
        """Where calls of the method go."""
        if method.server == "stage":
            return self.stages[STAGE_CALLED[method.name]].address
        return self._addresses[method.server]

    def open_channel(self, method: RpcMethod) -> grpc.aio.Channel:
        """A channel on which calls of the method go."""
        return open_channel(self.address(method))

    def control_of(self, index: int) -> ControlStream:
        """The stream of a coordinator to a lone stage."""
        who = {"credentials": self.coordinator, "role": stage_role(index)}
        return ControlStream(self.stages[index].address, **who)

    def metadata(self, random: Random) -> Metadata:
        return ()

    @property
    def must_end_with(self) -> grpc.StatusCode | None:
        """What every call must end with; None: with anything right."""
        return None

    def processes(self, server: str) -> list[Serving]:
        """The processes that calls to the server reach."""
        return [one.serving for one in self.stages] if server == "stage" else self._mesh_processes

    def complaints(self, server: str) -> list[str]:
        """What is wrong after calls to the server: deaths, wrong answers, what was not freed."""
        dead = [one.name for one in self.processes(server) if not lives(one.process)]
        if dead:
            return [f"{', '.join(dead)} died"]
        try:
            return list(self._wrong_answers(server))
        except (grpc.RpcError, TimeoutError, EOFError, AssertionError) as error:
            return [f"a right call fails: {error!r}"[:400]]

    def errors_logged(self) -> list[str]:
        """Lines that say of themselves that they are errors, or begin a traceback, or that the
        coordinator has lost a stage: no message to it is a reason for that."""
        logs = {one.log for one in [*self._mesh_processes, *(x.serving for x in self.stages)]}
        own = self.world.stage_addresses
        return [line for log in sorted(logs) for line in bad_lines(log, own_stages=own)]

    def _wrong_answers(self, server: str) -> Iterator[str]:
        if server == "supervisor":
            self._ask_supervisor()
        if server == "coordinator":
            self._drain_strangers()
        asked = "stage" if server == "stage" else "gateway"
        answer = self._ask(asked)
        if answer != self._right_answers[asked]:
            yield f"a right call is answered by {answer}"

    def _ask(self, server: str) -> list[int]:
        if server == "stage":
            return asyncio.run(self._ask_stages())
        with self._connect() as client:
            client.wait_until_idle()
            sampling = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
            answer = client.generate(token_ids=PROMPT, sampling=sampling, timeout_s=ANSWER_S)
            client.wait_until_idle()
            return answer.token_ids

    async def _ask_stages(self) -> list[int]:
        """A token of the whole pipeline, whose stages a coordinator of ours drives."""
        how = {"epoch": next_epoch(), "term": term_of_now(), "credentials": self.coordinator}
        driver = HandDrivenCoordinator(self.stages, **how)
        async with asyncio.timeout(ANSWER_S), driver:
            await driver.open()
            await driver.run(micro_batch(1, {0: PROMPT}, starts=[start(0)]))
            return list((await driver.sampled()).token_ids)

    def _ask_supervisor(self) -> None:
        with self._dial_supervisor(self._addresses["supervisor"]) as channel:
            try:
                SupervisorServiceStub(channel).KeepReplica(
                    KeepReplicaRequest(address="nobody:1"), timeout=ANSWER_S
                )
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise

    def _drain_strangers(self) -> None:
        """Lets replicas go that calls have added."""
        with self._connect() as client:
            for stage in client.mesh().stages:
                if stage.address not in self.world.stage_addresses:
                    request = DrainReplicaRequest(address=stage.address)
                    list(client.coordinator.DrainReplica(request, timeout=ANSWER_S))

    def _connect(self) -> AbstractContextManager[Client]:
        """A client who may do everything."""
        reached = {name: self._addresses[name] for name in ("gateway", "coordinator")}
        return connect(**reached)

    def _dial_supervisor(self, address: str) -> grpc.Channel:
        return grpc.insecure_channel(address)


@contextmanager
def serving(folder: Path) -> Iterator[Servers]:
    """Starts everything around a tiny model, and ends it."""
    with tiny_mesh(folder) as mesh, lone_stages(mesh, folder) as stages:
        yield Servers(mesh, stages)


@contextmanager
def tiny_mesh(folder: Path, **environment: str) -> Iterator[LocalMesh]:
    """A mesh of two stages around a tiny model."""
    model = write_servable(folder / MODEL, TinyModel(context_length=CONTEXT_LENGTH))
    mesh = LocalMesh(runtime=folder, environment=environment)
    mesh.start("--model", str(model), "--stages", "2", "--kv-memory", "16MiB")
    try:
        yield mesh
    finally:
        mesh.stop()


@contextmanager
def lone_stages(mesh: LocalMesh, folder: Path) -> Iterator[list[LoneStage]]:
    """The same two stages once more, that no coordinator drives, with the mesh's certificates."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(_lone_stage(folder, index, certs=mesh.record.certs))
            for index in range(len(LAYERS))
        ]


@contextmanager
def _lone_stage(folder: Path, index: int, *, certs: str) -> Iterator[LoneStage]:
    log = folder / f"lone-stage-{index}.log"
    arguments = ["--model", str(folder / MODEL), "--name", MODEL, "--layers", LAYERS[index]]
    arguments += ["--listen", "127.0.0.1:0", "--kv-blocks", "64", "--dtype", "bf16"]
    if certs:
        arguments += ["--certs", str(Path(certs) / name_of(stage_role(index)))]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.stage", *arguments, "--exit-with-parent"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stderr=stream,
            env=_environment(),
        )
    try:
        port = _wait_for_port(log, process)
        serves = Serving(name=f"lone stage {index}", process=psutil.Process(process.pid), log=log)
        yield LoneStage(address=f"127.0.0.1:{port}", serving=serves)
    finally:
        process.communicate(timeout=STOP_S)


def _environment() -> dict[str, str]:
    return os.environ | ONE_THREAD | {"PYTHONPATH": f"{ROOT}:{ROOT}/protos/generated"}


def _wait_for_port(log: Path, process: subprocess.Popen[bytes]) -> int:
    while process.poll() is None:
        events = [json.loads(line) for line in log.read_text().splitlines()]
        if any(event["message"] == "stage ready" for event in events):
            return next(event["port"] for event in events if event["message"] == "stage listens")
        time.sleep(0.05)
    raise RuntimeError(log.read_text())


def mesh_processes(record: MeshRecord) -> list[Serving]:
    return [
        Serving(name=one.name, process=psutil.Process(one.pid), log=Path(one.log))
        for one in record.processes
    ]


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def bad_lines(log: Path, *, own_stages: Sequence[str]) -> list[str]:
    return [
        line[-600:]
        for line in log.read_text(errors="replace").splitlines()
        if any(word in line for word in ('"level": "ERROR"', "Traceback"))
        or ('"replica lost"' in line and any(f"({address})" in line for address in own_stages))
    ]
