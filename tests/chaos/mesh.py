"""A mesh of real processes whose every wire leads through a proxy."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc

from core.models.registry import load_config
from core.weights.open import open_checkpoint
from services.common.channels import open_channel
from services.local.ports import HOST, free_ports
from tests.chaos.parts import Part, PartCommand
from tests.support.client import is_idle
from tests.support.fault_proxy import FaultProxy

START_TIMEOUT_S = 300.0  # kernels may have to be compiled first
MODEL_NAME = "chaos"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a mesh is made of."""

    model: Path
    number_format: str = "bf16"
    num_stages: int = 2
    num_replicas: int = 1
    num_gateways: int = 1
    kv_blocks: int = 512
    max_sequences: int = 64
    max_waiting: int = 1024
    resume_limit_s: float = 30.0
    seed: int = 0


class ChaosMesh:
    """Runs as long as its context. `parts` and `wires` are what faults can be done to.

    Wires lead to a part, and are named for it: clients to a gateway, a gateway to the coordinator,
    and the coordinator and the stage before to a stage.
    """

    def __init__(self, shape: Shape, *, folder: Path) -> None:
        self.shape = shape
        self.parts: dict[str, Part] = {}
        self.wires: dict[str, FaultProxy] = {}
        self.metrics_ports: dict[str, int] = {}  # of gateways
        self._folder = folder
        self._stack = AsyncExitStack()

    @property
    def stage_names(self) -> list[str]:
        return [name for name in self.parts if name.startswith("stage")]

    @property
    def gateway_names(self) -> list[str]:
        return [name for name in self.parts if name.startswith("gateway")]

    async def __aenter__(self) -> ChaosMesh:
        try:
            stages = [await self._add_stage(index) for index in range(self.shape.num_stages)]
            coordinator = await self._add(
                "coordinator",
                ("--stages", ",".join("|".join(replicas) for replicas in stages)),
                ("--max-sequences", str(self.shape.max_sequences)),
                ("--max-waiting", str(self.shape.max_waiting)),
            )
            for index in range(self.shape.num_gateways):
                self.metrics_ports[f"gateway-{index}"] = free_ports(1)[0]
                await self._add(
                    f"gateway-{index}",
                    ("--metrics-port", str(self.metrics_ports[f"gateway-{index}"])),
                    ("--coordinator", coordinator, "--model", str(self.shape.model)),
                    ("--resume-limit-s", str(self.shape.resume_limit_s)),
                )
            channel = open_channel(self.parts["coordinator"].command.address)
            self._coordinator = coordinator_pb2_grpc.CoordinatorServiceStub(
                await self._stack.enter_async_context(channel)
            )
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

    async def mesh(self) -> coordinator_pb2.GetMeshResponse | None:
        """The state of the mesh; None while the coordinator cannot say."""
        try:
            return await self._coordinator.GetMesh(coordinator_pb2.GetMeshRequest(), timeout=1.0)
        except grpc.aio.AioRpcError:
            return None

    async def is_whole(self) -> bool:
        """Whether every replica of every stage is ready."""
        mesh = await self.mesh()
        return mesh is not None and mesh.model.ready and all(one.ready for one in mesh.stages)

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

    async def _add_stage(self, index: int) -> list[str]:
        num_layers = _num_layers(self.shape.model)
        first, end = (num_layers * i // self.shape.num_stages for i in (index, index + 1))
        return [
            await self._add(
                f"stage-{index}-{replica}",
                ("--model", str(self.shape.model), "--name", MODEL_NAME, "--no-shortcuts"),
                ("--layers", f"{first}:{end}", "--dtype", self.shape.number_format),
                ("--kv-blocks", str(self.shape.kv_blocks)),
                ("--max-sequences", str(self.shape.max_sequences)),
            )
            for replica in range(self.shape.num_replicas)
        ]

    async def _add(self, name: str, *options: tuple[str, ...]) -> str:
        """Starts a part behind a wire; returns the wire's address."""
        address = f"{HOST}:{free_ports(1)[0]}"
        arguments = ("--listen", address, "--exit-with-parent")
        arguments += tuple(word for option in options for word in option)
        module = f"services.{name.split('-')[0]}"
        command = PartCommand(name=name, module=module, arguments=arguments, address=address)
        part = self.parts[name] = Part(command, folder=self._folder)
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
