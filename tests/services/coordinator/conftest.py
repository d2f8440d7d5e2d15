"""A real coordinator in this process, and a client that stands for a gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc, generation_pb2

from core.errors import Superseded
from services.common.health import HealthService
from services.common.servers import create_server
from services.common.telemetry import Telemetry, start_telemetry
from services.coordinator.conductor import Conductor
from services.coordinator.roster import Roster
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.settings import CoordinatorSettings
from tests.support.fake_stages import FakeStage, fake_stages


class Gateway:
    """One Connect stream; sorts updates by request."""

    def __init__(self, channel: grpc.aio.Channel, *, takes_over: bool = True) -> None:
        self._takes_over = takes_over
        self.stub: Any = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        self._call: Any = None
        self._queues: dict[int, asyncio.Queue[coordinator_pb2.RequestUpdate]] = {}
        self._mesh_changed = asyncio.Condition()
        self._next_id = 1
        self.mesh = coordinator_pb2.MeshState()
        self._reader: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()  # a stream takes one write at a time

    async def __aenter__(self) -> Gateway:
        self._call = self.stub.Connect(wait_for_ready=True)
        if self._takes_over:
            await self.take_over()
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        assert self._reader is not None
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        async for response in self._call:
            if response.HasField("mesh"):
                async with self._mesh_changed:
                    self.mesh = response.mesh
                    self._mesh_changed.notify_all()
            bare = zip(response.token_request_ids, response.token_ids, strict=True)
            for request_id, token_id in bare:
                update = coordinator_pb2.RequestUpdate(token_ids=[token_id])
                self._queues[request_id].put_nowait(update)
            for update in response.updates:
                self._queues[update.request_id].put_nowait(update)

    async def submit(
        self,
        token_ids: Sequence[int],
        max_tokens: int = 8,
        *,
        timeout_s: float | None = None,
        traceparent: str = "",
        cache_salt: str = "",
        request_id: int | None = None,
        num_output_tokens: int = 0,
        **sampling: Any,
    ) -> int:
        if request_id is None:
            request_id = self._next_id
            self._next_id += 1
            self._queues[request_id] = asyncio.Queue()
        submission = coordinator_pb2.Submission(
            request_id=request_id,
            token_ids=token_ids,
            sampling=generation_pb2.SamplingParameters(max_tokens=max_tokens, **sampling),
            traceparent=traceparent,
            cache_salt=cache_salt,
            num_output_tokens=num_output_tokens,
        )
        if timeout_s is not None:
            submission.timeout.FromMilliseconds(int(timeout_s * 1000))
        await self._write(coordinator_pb2.ConnectRequest(submissions=[submission]))
        return request_id

    async def take_over(self) -> None:
        await self._write(coordinator_pb2.ConnectRequest(take_over=True))

    async def cancel(self, request_id: int) -> None:
        cancellation = coordinator_pb2.Cancellation(request_id=request_id)
        await self._write(coordinator_pb2.ConnectRequest(cancellations=[cancellation]))

    async def _write(self, request: coordinator_pb2.ConnectRequest) -> None:
        async with self._writing:
            await self._call.write(request)

    async def next_update(self, request_id: int) -> coordinator_pb2.RequestUpdate:
        return await self._queues[request_id].get()

    def has_ended(self, request_id: int) -> bool:
        """Whether a last update waits to be read; takes all that wait."""
        queue = self._queues[request_id]
        return any(queue.get_nowait().finish_reason for _ in range(queue.qsize()))

    async def finish(self, request_id: int) -> tuple[list[int], coordinator_pb2.RequestUpdate]:
        """All tokens of a request up to its last update, and that update."""
        tokens: list[int] = []
        while True:
            update = await self.next_update(request_id)
            tokens += update.token_ids
            if update.finish_reason:
                return tokens, update

    async def generate(
        self, token_ids: Sequence[int], max_tokens: int = 8, **sampling: Any
    ) -> list[int]:
        request_id = await self.submit(token_ids, max_tokens, **sampling)
        tokens, last = await self.finish(request_id)
        assert not last.HasField("refusal"), last.refusal.message
        return tokens

    async def wait_for_mesh(self, is_right: Callable[[coordinator_pb2.MeshState], bool]) -> None:
        async with self._mesh_changed:
            await self._mesh_changed.wait_for(lambda: is_right(self.mesh))

    async def until_the_stream_ends(self) -> None:
        assert self._reader is not None
        await self._reader

    async def wait_until_ready(self) -> None:
        await self.wait_for_mesh(lambda mesh: mesh.model.ready)

    async def until_all_are_ready(self) -> None:
        """Waits until every replica is open and connected."""
        while not all(one.ready for one in (await self.get_mesh()).stages):
            pass

    async def refusal(
        self, token_ids: Sequence[int], max_tokens: int = 8
    ) -> coordinator_pb2.Refusal:
        """Submits a request that is refused at once."""
        tokens, last = await self.finish(await self.submit(token_ids, max_tokens))
        assert not tokens
        assert last.finish_reason == generation_pb2.FINISH_REASON_ERROR
        return last.refusal

    async def get_mesh(self) -> coordinator_pb2.GetMeshResponse:
        return await self.stub.GetMesh(coordinator_pb2.GetMeshRequest())


class RunningCoordinator:
    """A coordinator that serves on a free port."""

    def __init__(
        self,
        conductor: Conductor,
        health: HealthService,
        address: str,
        running: asyncio.Task[None],
    ) -> None:
        self.conductor = conductor
        self.health = health
        self.address = address
        self.running = running  # fails when another coordinator takes over

    @asynccontextmanager
    async def gateway(self, *, takes_over: bool = True) -> AsyncIterator[Gateway]:
        async with (
            grpc.aio.insecure_channel(self.address) as channel,
            Gateway(channel, takes_over=takes_over) as gateway,
        ):
            yield gateway


def by_stage(stages: Sequence[FakeStage]) -> tuple[tuple[str, ...], ...]:
    """The addresses of each stage's replicas."""
    return tuple(
        tuple(stage.address for stage in stages if stage.index == index)
        for index in range(stages[0].num_stages)
    )


@asynccontextmanager
async def coordinator(
    stages: Sequence[FakeStage],
    telemetry: Telemetry | None = None,
    *,
    spares: Sequence[FakeStage] = (),
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> AsyncIterator[RunningCoordinator]:
    """Runs a coordinator for these stages; fails the test when its loop fails."""
    telemetry = telemetry or start_telemetry("test", metrics_port=None, environment={})
    health = HealthService()
    conductor = Conductor(
        CoordinatorSettings(
            listen="127.0.0.1:0",
            roster=Roster(
                stages=by_stage(stages), spares=frozenset(stage.address for stage in spares)
            ),
            **({"resume_grace_s": 0.0} | settings),
        ),
        telemetry,
        health,
        clock=clock,
    )
    server = create_server(telemetry)
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(
        CoordinatorServicer(conductor), server
    )
    await health.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    running = asyncio.create_task(conductor.run())
    try:
        yield RunningCoordinator(conductor, health, f"127.0.0.1:{port}", running)
        assert not running.done() or isinstance(running.exception(), Superseded)
    finally:
        await conductor.stop()
        await server.stop(1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Mesh(NamedTuple):
    """Stages, coordinator and a gateway that has seen the pipeline ready."""

    stages: list[FakeStage]
    coordinator: RunningCoordinator
    gateway: Gateway

    async def until_all_blocks_are_free(self) -> None:
        """Waits until the stages' mirrors are empty; then nothing may be held anywhere."""
        for stage in self.stages:
            await stage.until_it_holds_nothing()
        state = await self.gateway.get_mesh()
        held = {one.address: (one.sequences, one.kv_blocks_used) for one in state.stages}
        assert held == dict.fromkeys(held, (0, 0))
        assert [stage.violations for stage in self.stages] == [[] for _ in self.stages]


@asynccontextmanager
async def mesh(
    num_stages: int,
    *,
    replicas: Sequence[int] = (),
    spares: Sequence[int] = (),
    seconds_a_batch: float = 0.0,
    **settings: Any,
) -> AsyncIterator[Mesh]:
    """A ready mesh of fake stages, all of them open and connected; `spares` are indices of them."""
    async with (
        fake_stages(num_stages, replicas=replicas, seconds_a_batch=seconds_a_batch) as stages,
        coordinator(stages, spares=[stages[spare] for spare in spares], **settings) as running,
        running.gateway() as gateway,
    ):
        await gateway.wait_until_ready()
        await gateway.until_all_are_ready()
        yield Mesh(stages, running, gateway)
