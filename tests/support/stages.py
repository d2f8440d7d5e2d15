"""Real stage servers around fake engines or models, and a coordinator driven by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import grpc
import pytest
from penstock.v1 import generation_pb2, stage_pb2, stage_pb2_grpc

from services.common.channels import open_channel
from services.common.credentials import Credentials
from services.common.health import HealthService
from services.common.identity import stage_role
from services.common.servers import bind, create_server
from services.common.telemetry import Telemetry, no_telemetry
from services.stage.model import LoadedModel
from services.stage.servicer import StageServicer
from services.stage.stage import Stage
from services.stage.worker import Worker
from tests.support.counting_engine import HIDDEN_SIZE, CountingEngine, counting_model

TIMEOUT_S = 30.0
# Over the sockets within a host, and over gRPC alone.
both_ways = pytest.mark.parametrize("offers_shortcuts", [True, False])


@dataclass(frozen=True, kw_only=True)
class StageServer:
    """A stage server in this process."""

    address: str
    stage: Stage
    health: HealthService
    load: Callable[[], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class RunningStage(StageServer):
    """A stage server around a fake engine."""

    engine: CountingEngine


@asynccontextmanager
async def stage_server(
    load_model: Callable[[], LoadedModel],
    *,
    telemetry: Telemetry | None = None,
    loaded: bool = True,
    **options: Any,
) -> AsyncIterator[StageServer]:
    """Serves a model, which is loaded now or by the server's `load`; `options` are `Stage`'s."""
    telemetry = telemetry or no_telemetry()
    loop = asyncio.get_running_loop()
    worker: Worker[LoadedModel] = Worker(loop.call_soon_threadsafe)
    health = HealthService()
    stage = Stage(worker, health=health, telemetry=telemetry, **options)
    server = create_server(telemetry)
    stage_pb2_grpc.add_StageServiceServicer_to_server(StageServicer(stage), server)
    await health.add_to(server)
    port = bind(server, "127.0.0.1:0")
    await server.start()

    async def load() -> None:
        await _load(worker, stage, load_model)

    if loaded:
        await load()
    try:
        yield StageServer(address=f"127.0.0.1:{port}", stage=stage, health=health, load=load)
    finally:
        await stage.close()
        await server.stop(None)
        await asyncio.to_thread(worker.stop, timeout_s=TIMEOUT_S)


async def _load(
    worker: Worker[LoadedModel], stage: Stage, load_model: Callable[[], LoadedModel]
) -> None:
    done: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
    worker.start(
        load_model,
        engine_of=lambda model: model.engine,
        on_loaded=done.set_result,
        on_failure=lambda error: done.set_exception(error),
    )
    await stage.set_model(await done)


@asynccontextmanager
async def running_stage(
    *, index: int, num_stages: int, hidden_size: int = HIDDEN_SIZE, **options: Any
) -> AsyncIterator[RunningStage]:
    """Runs stage `index` of a fake model; `options` are those of `stage_server`."""
    is_last = index == num_stages - 1
    engine = CountingEngine(is_first=index == 0, is_last=is_last, hidden_size=hidden_size)
    model = counting_model(engine, index=index, num_stages=num_stages)
    async with stage_server(lambda: model, **options) as server:
        try:
            yield RunningStage(engine=engine, **vars(server))
        finally:
            engine.gate.set()


@asynccontextmanager
async def running_replicas(*places: int, **options: Any) -> AsyncIterator[list[RunningStage]]:
    """Runs a replica of a fake stage for each of `places`; `options` are `running_stage`'s."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                running_stage(index=place, num_stages=max(places) + 1, **options)
            )
            for place in places
        ]


def running_chain(
    num_stages: int, **options: Any
) -> AbstractAsyncContextManager[list[RunningStage]]:
    """Runs all stages of a fake model, one replica each."""
    return running_replicas(*range(num_stages), **options)


class Addressed(Protocol):
    """What listens somewhere."""

    @property
    def address(self) -> str: ...


class ControlStream:
    """The coordinator's end of a Control stream; with its credentials, to a stage of that role."""

    def __init__(
        self, address: str, *, credentials: Credentials | None = None, role: str = ""
    ) -> None:
        self._dial = partial(open_channel, address, credentials=credentials, role=role)
        self._seen: list[stage_pb2.ControlResponse] = []

    async def __aenter__(self) -> ControlStream:
        self._channel = self._dial()
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

    async def open(self, *, epoch: int, index: int, num_stages: int, term: int = 0) -> None:
        await self.send(
            open=stage_pb2.OpenPipeline(
                epoch=epoch,
                term=term,
                stage_index=index,
                num_stages=num_stages,
                num_slots=64,
            )
        )

    async def next(self, kind: str) -> Any:
        """Returns the next event of a kind, passing over others; raises the stream's error.

        What was passed over comes first the next time that its kind is asked for.
        """
        for response in self._seen:
            if response.WhichOneof("event") == kind:
                self._seen.remove(response)
                return getattr(response, kind)
        while True:
            async with asyncio.timeout(TIMEOUT_S):
                response = await self.call.read()
            if response is grpc.aio.EOF:
                code = await self.call.code()
                raise EOFError(f"the stream ended with {code}")
            if response.WhichOneof("event") == kind:
                return getattr(response, kind)
            self._seen.append(response)

    async def report(self) -> Any:
        """Asks for a report, and returns the next one: stages send some of themselves, too."""
        await self.send(report=stage_pb2.ReportRequest())
        return await self.next("report")

    async def failure(self) -> grpc.aio.AioRpcError:
        """Returns the error that the stream ends with."""
        try:
            while True:
                await self.next("none of them")
        except grpc.aio.AioRpcError as error:
            return error


class HandDrivenCoordinator:
    """Control streams to replicas, and links between them."""

    def __init__(
        self,
        stages: Sequence[Addressed],
        *,
        places: Sequence[int] | None = None,
        epoch: int = 1,
        term: int = 0,
        credentials: Credentials | None = None,
    ) -> None:
        """`places` says which stage each is a replica of; without, they are one chain."""
        self._stages = list(stages)
        self._places = list(places if places is not None else range(len(stages)))
        self._num_stages = max(self._places) + 1
        self._epoch, self._term = epoch, term
        self._credentials = credentials
        self._stack = AsyncExitStack()
        self._num_links = 0
        self.links: dict[tuple[int, int], int] = {}
        self.lost: set[int] = set()  # replicas that get no micro-batches any more
        self.controls: list[ControlStream] = []

    async def __aenter__(self) -> HandDrivenCoordinator:
        for stage, place in zip(self._stages, self._places, strict=True):
            who = {"credentials": self._credentials, "role": stage_role(place)}
            control = ControlStream(stage.address, **who)
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
        """Opens all replicas, connects all neighbours and returns what each holds."""
        for index in range(len(self.controls)):
            await self._open(index)
        readies = [await control.next("ready") for control in self.controls]
        for upstream, place in enumerate(self._places):
            for downstream, other in enumerate(self._places):
                if other == place + 1:
                    link = await self.connect(upstream, downstream)
                    assert link.stands
        return readies

    async def _open(self, index: int) -> None:
        await self.controls[index].open(
            epoch=self._epoch,
            index=self._places[index],
            num_stages=self._num_stages,
            term=self._term,
        )

    async def connect(self, upstream: int, downstream: int, *, address: str = "") -> Any:
        """Opens a link between two replicas, by their numbers here; returns its first state.

        `address` stands for the downstream replica's own.
        """
        self._num_links += 1
        self.links[upstream, downstream] = self._num_links
        order = stage_pb2.OpenDownstream(
            link_id=self._num_links,
            address=address or self._stages[downstream].address,
            epoch=self._epoch,
        )
        await self.controls[upstream].send(open_downstream=order)
        return await self.controls[upstream].next("link")

    async def run(
        self,
        batch: stage_pb2.MicroBatch,
        *,
        path: Sequence[int] | None = None,
        replays: bool = False,
    ) -> None:
        """Orders a micro-batch of the replicas of a path, without one of all.

        Token ids go to first stages only; with `replays` the first of the path sends from its log.
        """
        path = path if path is not None else range(len(self.controls))
        for number, index in enumerate(path):
            order = stage_pb2.MicroBatch()
            order.CopyFrom(batch)
            order.replays = replays and number == 0
            if self._places[index] > 0:
                order.ClearField("token_ids")
            if number > 0:
                order.upstream_link = self.links[path[number - 1], index]
            if number + 1 < len(path):
                order.downstream_link = self.links[index, path[number + 1]]
            if index not in self.lost:
                await self.controls[index].send(micro_batch=order)

    async def abandon(self, index: int, *micro_batch_ids: int) -> None:
        """Has a replica abandon micro-batches."""
        order = stage_pb2.AbandonMicroBatches(ids=micro_batch_ids)
        await self.controls[index].send(abandon=order)

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
