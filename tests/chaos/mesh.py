"""A mesh of real processes whose every wire leads through a proxy."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from core.models.registry import load_config
from core.weights.open import open_checkpoint
from services.common.channels import open_channel
from services.local.coordinators import Coordinators
from services.local.fork_server import launch
from services.local.forking import ForkServer
from services.local.mesh import Patience
from services.local.ports import HOST, HeldPorts
from services.local.process import MeshProcess, ProcessCommand
from services.local.settings import MeshSettings
from services.local.threads import choose_threads
from tests.chaos.parts import RESTART_PAUSE_S, Part
from tests.support.client import is_idle
from tests.support.fault_proxy import FaultProxy

START_TIMEOUT_S = 300.0  # kernels may have to be compiled first
MODEL_NAME = "chaos"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a mesh is made of. Updates give stages the weights of `models` in turn."""

    models: tuple[Path, ...]
    number_format: str = "bf16"
    device: str = "cpu"
    num_stages: int = 2
    num_replicas: int = 1
    num_spares: int = 0
    num_coordinators: int = 1
    num_gateways: int = 1
    kv_blocks: int = 512
    max_sequences: int = 64
    max_waiting: int = 1024
    resume_limit_s: float = 30.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A stage's process. `version`: the number of its model in `Shape.models`."""

    name: str
    address: str
    stage_index: int
    layers: str
    version: int
    is_spare: bool


class ChaosMesh:
    """Runs as long as its context. `parts` and `wires` are what faults can be done to.

    Wires lead to a part, and are named for it: clients to a gateway, a gateway to a coordinator,
    and the coordinators and the stage before to a stage.
    """

    def __init__(self, shape: Shape, *, folder: Path) -> None:
        self.shape = shape
        self.parts: dict[str, Part] = {}
        self.wires: dict[str, FaultProxy] = {}
        self.metrics_ports: dict[str, int] = {}  # of gateways
        self.replicas: list[Replica] = []
        self.serving = ""  # the coordinator that served when it was last asked
        self.waiting: set[str] = set()  # stages' replicas that were spare then
        self._coordinators: dict[str, Any] = {}  # stubs, by the part's name
        self._num_replicas: Counter[int] = Counter()  # of each stage, ever
        self.num_layers = _num_layers(shape.models[0])
        ends = [
            self.num_layers * index // shape.num_stages for index in range(shape.num_stages + 1)
        ]
        self.cut = [f"{first}:{end}" for first, end in pairwise(ends)]  # layers of each stage
        self._folder = folder
        self._stack = AsyncExitStack()
        # Parts listen seconds after they were told where, and again whenever they are started.
        self._ports = self._stack.enter_context(HeldPorts())

    @property
    def gateway_names(self) -> list[str]:
        return [name for name in self.parts if name.startswith("gateway")]

    @property
    def versions(self) -> tuple[int, ...]:
        """Whose weights each stage has; between updates all replicas of a stage have the same."""
        version_of = {one.layers: one.version for one in self.replicas}
        return tuple(version_of[layers] for layers in self.cut)

    async def __aenter__(self) -> ChaosMesh:
        shape = self.shape
        try:
            self._lifeline_fd, end = os.pipe()
            self._stack.callback(os.close, self._lifeline_fd)
            self._stack.callback(os.close, end)
            self._fork_server = ForkServer(launch())
            self._stack.push_async_callback(self._fork_server.close)
            for index in range(shape.num_stages):
                for number in range(shape.num_replicas + shape.num_spares):
                    await self.add_replica(index, is_spare=number >= shape.num_replicas)
            names = [f"coordinator-{index}" for index in range(shape.num_coordinators)]
            coordinators = [await self._add(name, self._coordinator_options()) for name in names]
            for index in range(shape.num_gateways):
                self.metrics_ports[f"gateway-{index}"] = self._ports.take()
                options = (
                    *("--metrics-port", str(self.metrics_ports[f"gateway-{index}"])),
                    *("--coordinator", ",".join(coordinators), "--model", str(shape.models[0])),
                    *("--resume-limit-s", str(shape.resume_limit_s)),
                )
                await self._add(f"gateway-{index}", options)
            for name in names:
                channel = await self._channel(self.parts[name].command.address)
                self._coordinators[name] = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            gateway = await self._channel(self.parts["gateway-0"].command.address)
            self._health: Any = health_pb2_grpc.HealthStub(gateway)
            await self._wait_until_whole()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    # --- what there is to see

    @property
    def coordinators(self) -> Coordinators:
        """For those who ask the one that serves, whichever that is."""
        return Coordinators(list(self._coordinators.items()))

    async def mesh(self) -> coordinator_pb2.GetMeshResponse | None:
        """The state of the mesh, by the coordinator that serves; None while none does."""
        request = coordinator_pb2.GetMeshRequest()
        for name, stub in self._coordinators.items():
            try:
                mesh = await stub.GetMesh(request, timeout=1.0)
            except grpc.aio.AioRpcError:
                continue
            if mesh.model.name:
                self.serving = name
                spares = {one.address for one in mesh.stages if one.spare}
                self.waiting = {one.name for one in self.replicas if one.address in spares}
                return mesh
        return None

    async def is_whole(self) -> bool:
        """Whether every replica of every stage is ready, and clients are told so."""
        mesh = await self.mesh()
        if mesh is None or not mesh.model.ready or not all(one.ready for one in mesh.stages):
            return False
        return await self._is_healthy("")

    async def is_red(self, part: str) -> bool:
        """Whether a fault of the part shows: in what clients are told of it, or where another
        one takes its place, in the state of the mesh."""
        if not part.startswith("stage"):
            return not await self._is_healthy("")
        replica = next((one for one in self.replicas if one.name == part), None)
        if replica is None:
            return False  # it has been replaced
        if len([one for one in self.replicas if one.layers == replica.layers]) == 1:
            return not await self._is_healthy(f"{MODEL_NAME}/stage/{replica.stage_index}")
        mesh = await self.mesh()
        return mesh is None or any(
            one.address == replica.address and not one.ready for one in mesh.stages
        )

    async def _is_healthy(self, service: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = await self._health.Check(request, timeout=1.0)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _is_idle(self) -> bool:
        mesh = await self.mesh()
        return mesh is not None and is_idle(mesh)

    async def _wait_until_whole(self) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await self.is_whole():  # noqa: ASYNC110 (nothing announces it)
                await asyncio.sleep(0.05)

    async def wait_until_idle(self, *, timeout_s: float = 30.0) -> None:
        """Waits until no request is left, and no KV block in use on any stage."""
        async with asyncio.timeout(timeout_s):
            while not await self._is_idle():  # noqa: ASYNC110 (likewise)
                await asyncio.sleep(0.02)

    # --- replicas come and go

    async def add_replica(
        self,
        stage_index: int,
        *,
        is_spare: bool = False,
        version: int = 0,
        layers: str = "",
    ) -> Replica:
        """Starts one. Coordinators that start later know it, where its layers are those of a stage
        then; the one that serves must be told."""
        layers = layers or self.cut[stage_index]
        name = f"stage-{stage_index}-{self._num_replicas[stage_index]}"
        self._num_replicas[stage_index] += 1
        options = (
            *("--model", str(self.shape.models[version]), "--name", MODEL_NAME, "--no-shortcuts"),
            *("--layers", layers, "--dtype", self.shape.number_format),
            *("--device", self.shape.device),
            *("--kv-blocks", str(self.shape.kv_blocks)),
            *("--max-sequences", str(self.shape.max_sequences)),
            *("--slow-down-file", str(self.pace_file(name))),
            *("--threads-alone", str(choose_threads(MeshSettings()).threads_alone)),
        )
        has_stand_in = self.shape.num_replicas + self.shape.num_spares > 1
        replica = Replica(
            name=name,
            address=await self._add(
                name,
                options,
                restart_pause_s=Patience.stand_in_pause_s if has_stand_in else RESTART_PAUSE_S,
            ),
            stage_index=stage_index,
            layers=layers,
            version=version,
            is_spare=is_spare,
        )
        self.replicas.append(replica)
        if layers in self.cut:
            self._tell_coordinators()
        return replica

    def keep_cut(self, cut: Sequence[str]) -> None:
        """What the stages are from now on."""
        self.cut = list(cut)
        self._tell_coordinators()

    @property
    def leaving(self) -> list[Replica]:
        """Those whose layers are no stage any more."""
        return [one for one in self.replicas if one.layers not in self.cut]

    async def remove_replica(self, address: str) -> None:
        """Ends one for good; likewise."""
        replica = next(one for one in self.replicas if one.address == address)
        self.replicas.remove(replica)
        self._tell_coordinators()
        await self.parts.pop(replica.name).stop()
        await self.wires.pop(replica.name).__aexit__()

    def pace_file(self, part: str) -> Path:
        """What is written there makes a stage's part slow."""
        return self._folder / f"{part}.pace"

    def _tell_coordinators(self) -> None:
        """What they start with from now on; those that wait start again."""
        for name in self._coordinators:
            part = self.parts[name]
            part.restart_with((*part.command.arguments[:2], *self._coordinator_options()))
            if name != self.serving:
                part.terminate()

    @property
    def _staying(self) -> list[Replica]:
        return [one for one in self.replicas if one.layers in self.cut]

    def _coordinator_options(self) -> tuple[str, ...]:
        stages = [
            "|".join(one.address for one in self.replicas if one.layers == layers)
            for layers in self.cut
        ]
        return (
            *("--stages", ",".join(stages)),
            *("--spares", ",".join(one.address for one in self._staying if one.is_spare)),
            *("--max-sequences", str(self.shape.max_sequences)),
            *("--max-waiting", str(self.shape.max_waiting)),
            "--no-shortcuts",
        )

    # --- processes

    async def _channel(self, address: str) -> grpc.aio.Channel:
        return await self._stack.enter_async_context(open_channel(address))

    async def _add(
        self, name: str, options: tuple[str, ...], *, restart_pause_s: float = RESTART_PAUSE_S
    ) -> str:
        """Starts a part behind a wire; returns the wire's address."""
        address = f"{HOST}:{self._ports.take()}"
        command = ProcessCommand(
            name=name,
            module=f"services.{name.split('-')[0]}",
            arguments=("--listen", address, *options),
            address=address,
            metrics_port=0,
            can_be_forked=self.shape.device == "cpu",
        )
        process = MeshProcess(
            command,
            log_path=self._folder / f"{name}.log",
            lifeline_fd=self._lifeline_fd,
            fork_server=self._fork_server,
        )
        part = self.parts[name] = Part(process, restart_pause_s=restart_pause_s)
        self._stack.push_async_callback(part.stop)
        await part.start()
        wire = self.wires[name] = FaultProxy(address, seed=self.shape.seed)
        return (await self._stack.enter_async_context(wire)).address


def _num_layers(model: Path) -> int:
    checkpoint = open_checkpoint(model)
    try:
        return load_config(checkpoint).num_layers
    finally:
        checkpoint.close()
