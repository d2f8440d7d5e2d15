"""Real stage servers around fake engines, and a coordinator that a test drives by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from penstock.v1 import generation_pb2, stage_pb2, stage_pb2_grpc

from services.common.channels import open_channel
from services.common.health import HealthService
from services.common.servers import bind, create_server
from services.common.telemetry import Telemetry, no_telemetry
from services.stage.model import LoadedModel
from services.stage.servicer import StageServicer
from services.stage.stage import Stage
from services.stage.worker import Worker
from tests.support.counting_engine import HIDDEN_SIZE, CountingEngine, counting_model

TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class RunningStage:
    """A stage server in this process."""

    address: str
    engine: CountingEngine
    stage: Stage
    health: HealthService
    load: Callable[[], Awaitable[None]]


@asynccontextmanager
async def running_stage(
    *,
    index: int,
    num_stages: int,
    initial_credits: int | None = None,
    offers_shortcuts: bool = True,
    telemetry: Telemetry | None = None,
    hidden_size: int = HIDDEN_SIZE,
    loaded: bool = True,
) -> AsyncIterator[RunningStage]:
    """Runs stage `index` of a fake model."""
    telemetry = telemetry or no_telemetry()
    is_last = index == num_stages - 1
    engine = CountingEngine(is_first=index == 0, is_last=is_last, hidden_size=hidden_size)
    model = counting_model(engine, index=index, num_stages=num_stages)
    loop = asyncio.get_running_loop()
    worker: Worker[LoadedModel] = Worker(loop.call_soon_threadsafe)
    health = HealthService()
    stage = Stage(
        worker,
        health=health,
        telemetry=telemetry,
        initial_credits=initial_credits,
        offers_shortcuts=offers_shortcuts,
    )
    server = create_server(telemetry)
    stage_pb2_grpc.add_StageServiceServicer_to_server(StageServicer(stage), server)
    await health.add_to(server)
    port = bind(server, "127.0.0.1:0")
    await server.start()

    async def load() -> None:
        await _load(worker, stage, model)

    if loaded:
        await load()
    try:
        yield RunningStage(
            address=f"127.0.0.1:{port}", engine=engine, stage=stage, health=health, load=load
        )
    finally:
        engine.gate.set()
        await stage.close()
        await server.stop(None)
        await asyncio.to_thread(worker.stop, timeout_s=TIMEOUT_S)


async def _load(worker: Worker[LoadedModel], stage: Stage, model: LoadedModel) -> None:
    done: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
    worker.start(
        lambda: model,
        engine_of=lambda model: model.engine,
        on_loaded=done.set_result,
        on_failure=lambda error: done.set_exception(error),
    )
    await stage.set_model(await done)


@asynccontextmanager
async def running_chain(num_stages: int, **options: Any) -> AsyncIterator[list[RunningStage]]:
    """Runs all stages of a fake model; `options` are those of `running_stage`."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                running_stage(index=index, num_stages=num_stages, **options)
            )
            for index in range(num_stages)
        ]


class ControlStream:
    """The coordinator's end of a Control stream."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._seen: list[stage_pb2.ControlResponse] = []

    async def __aenter__(self) -> ControlStream:
        self._channel = open_channel(self._address)
        stub: Any = stage_pb2_grpc.StageServiceStub(self._channel)
        self.call = stub.Control(wait_for_ready=True)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.call.cancel()
        await self._channel.close()

    async def send(self, **order: Any) -> None:
        await self.call.write(stage_pb2.ControlRequest(**order))

    async def open(self, *, epoch: int, index: int, num_stages: int, downstream: str = "") -> None:
        await self.send(
            open=stage_pb2.OpenPipeline(
                epoch=epoch,
                stage_index=index,
                num_stages=num_stages,
                downstream_address=downstream,
                num_slots=64,
            )
        )

    async def next(self, kind: str) -> Any:
        """Returns the next event of a kind, passing over others; raises the stream's error."""
        while True:
            async with asyncio.timeout(TIMEOUT_S):
                response = await self.call.read()
            if response is grpc.aio.EOF:
                code = await self.call.code()
                raise EOFError(f"the stream ended with {code}")
            if response.WhichOneof("event") == kind:
                return getattr(response, kind)

    async def failure(self) -> grpc.aio.AioRpcError:
        """Returns the error that the stream ends with."""
        try:
            while True:
                await self.next("none of them")
        except grpc.aio.AioRpcError as error:
            return error


class HandDrivenCoordinator:
    """Control streams to all stages of a chain."""

    def __init__(self, stages: Sequence[RunningStage], *, epoch: int = 1) -> None:
        self._stages = stages
        self._epoch = epoch
        self._stack = AsyncExitStack()
        self.controls: list[ControlStream] = []

    async def __aenter__(self) -> HandDrivenCoordinator:
        for stage in self._stages:
            control = ControlStream(stage.address)
            self.controls.append(await self._stack.enter_async_context(control))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def open(self) -> list[Any]:
        """Opens the pipeline and returns what each stage says it holds."""
        num_stages = len(self._stages)
        for index, control in enumerate(self.controls):
            downstream = self._stages[index + 1].address if index + 1 < num_stages else ""
            await control.open(
                epoch=self._epoch, index=index, num_stages=num_stages, downstream=downstream
            )
        return [await control.next("ready") for control in self.controls]

    async def run(self, batch: stage_pb2.MicroBatch) -> None:
        """Orders a micro-batch of all stages; token ids go to the first one only."""
        for index, control in enumerate(self.controls):
            order = stage_pb2.MicroBatch()
            order.CopyFrom(batch)
            if index > 0:
                order.ClearField("token_ids")
            await control.send(micro_batch=order)

    async def sampled(self) -> Any:
        return await self.controls[-1].next("sampled")


def start(slot: int, **fields: Any) -> stage_pb2.SequenceStart:
    """A sequence that begins, with sampling that every stage accepts."""
    sampling = generation_pb2.SamplingParameters(
        max_tokens=10, temperature=0, top_p=1, repetition_penalty=1
    )
    return stage_pb2.SequenceStart(slot=slot, request_id=slot + 100, sampling=sampling, **fields)


def micro_batch(
    id: int,
    rows: dict[int, Sequence[int]],
    *,
    first_position: int = 0,
    starts: Sequence[stage_pb2.SequenceStart] = (),
    ended: Sequence[int] = (),
) -> stage_pb2.MicroBatch:
    """A micro-batch with token ids by slot; runs sample once and begin at `first_position`."""
    return stage_pb2.MicroBatch(
        id=id,
        updates=stage_pb2.SequenceUpdates(
            starts=starts,
            ended_slots=ended,
            block_slots=[one.slot for one in starts],
            block_ids=[one.slot for one in starts],
        ),
        slots=list(rows),
        first_positions=[first_position] * len(rows),
        num_rows=[len(tokens) for tokens in rows.values()],
        num_samples=[1] * len(rows),
        token_ids=[token for tokens in rows.values() for token in tokens],
    )
