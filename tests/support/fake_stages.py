"""Stages that compute a simple function instead of a model, behind real gRPC servers.

A fake stage performs orders in their order and refuses wrong ones as a real one would. For want
of activations it passes on token ids, each with a digest of the prefix that its own cache holds:
so the next stage finds out when a cache, restored maybe, is not what it should be. They travel
within this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc, tensor_pb2

from services.common.servers import create_server
from services.common.telemetry import no_telemetry
from tests.support.fake_engine import EOS, VOCAB_SIZE
from tests.support.fake_session import FakeSession


@dataclass(eq=False)
class FakeStage(stage_pb2_grpc.StageServiceServicer):
    """One replica of a stage. Change its fields to misbehave."""

    index: int
    num_stages: int  # with two layers each
    network: dict[str, FakeStage] = field(default_factory=dict)  # by address; all of a mesh
    num_kv_blocks: int = 64
    max_rows: int = 64
    context_length: int = 512
    block_size: int = 16
    model: str = "fake"
    fingerprint: str = "f"
    codec: tensor_pb2.Codec = tensor_pb2.CODEC_F32
    weights: str = "w"
    first_layer: int = -1  # -1: two layers a stage
    end_layer: int = -1  # likewise
    seconds_a_batch: float = 0.0
    address: str = ""
    epochs: list[int] = field(default_factory=list)
    term: int = 0  # of the coordinator that has it
    traceparents: dict[int, str] = field(default_factory=dict)
    num_batches: int = 0
    num_rows: int = 0  # computed, in all incarnations
    num_replayed: int = 0  # rows sent again
    violations: list[str] = field(default_factory=list)
    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    may_compute: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: as by SIGSTOP
    may_link: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: links break
    session: FakeSession | None = None
    _server: Any = None

    @property
    def is_last(self) -> bool:
        return self.layers[1] == 2 * self.num_stages

    @property
    def layers(self) -> tuple[int, int]:
        first = 2 * self.index if self.first_layer < 0 else self.first_layer
        return first, first + 2 if self.end_layer < 0 else self.end_layer

    async def start(self, port: int = 0) -> None:
        self._server = create_server(no_telemetry())
        stage_pb2_grpc.add_StageServiceServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        self.network[self.address] = self
        for event in (self.may_load, self.may_compute, self.may_answer, self.may_link):
            event.set()
        await self._server.start()

    async def stop(self) -> None:
        """Dies as a killed process does: streams break at once."""
        await self._server.stop(0)

    async def restart(self) -> None:
        await self.start(int(self.address.rpartition(":")[2]))

    def cut_links(self) -> None:
        """Breaks the links downstream; new ones can be had once `may_link` is set."""
        self.may_link.clear()
        assert self.session is not None
        self.session.cut_links()

    async def until_it_holds_nothing(self) -> None:
        """Waits until every sequence has ended on this replica."""
        if self.session is not None:
            await self.session.until_it_holds_nothing()

    async def until_it_is_left(self) -> None:
        """Waits until the coordinator has ended its stream."""
        if self.session is not None:
            await self.session.until_closed()

    async def Control(
        self, requests: AsyncIterator[stage_pb2.ControlRequest], context: Any
    ) -> AsyncIterator[stage_pb2.ControlResponse]:
        await self.may_answer.wait()
        opened = await anext(aiter(requests))
        if opened.open.term < self.term:
            await context.abort(grpc.StatusCode.ABORTED, "its term is over")
        if self.session is not None and opened.open.term > self.term:
            self.session.outbox.put_nowait(None)
        self.term = opened.open.term
        self.epochs.append(opened.open.epoch)
        await self.may_load.wait()
        session = self.session = self.begin(opened.open.epoch)
        yield stage_pb2.ControlResponse(ready=self.ready())
        tasks = [
            asyncio.create_task(session.take_all(requests)),
            asyncio.create_task(session.perform_all()),
        ]
        try:
            while (response := await session.outbox.get()) is not None:
                await self.may_answer.wait()
                yield response
            if session is not self.session:
                await context.abort(grpc.StatusCode.ABORTED, "a later term has begun")
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.violations[-1])
        finally:
            for task in tasks:
                task.cancel()
            session.close()

    def begin(self, epoch: int) -> FakeSession:
        """Begins an incarnation."""
        return FakeSession(self, epoch)

    def ready(self) -> stage_pb2.StageReady:
        first, end = self.layers
        return stage_pb2.StageReady(
            model=self.model,
            model_digest="d",
            first_layer=first,
            end_layer=end,
            num_layers=2 * self.num_stages,
            hidden_size=8,
            vocab_size=VOCAB_SIZE,
            context_length=self.context_length,
            number_format="fp32",
            codec=self.codec,
            kv_block_size=self.block_size,
            num_kv_blocks=self.num_kv_blocks,
            max_rows=self.max_rows,
            weights_bytes=1000 + self.index,
            bytes_read=900,
            numerics_fingerprint=self.fingerprint,
            eos_token_ids=[EOS],
            weights_digest=f"{self.weights}{self.index}",
            layer_digests=[f"{self.weights}{layer}" for layer in range(first, end)],
        )


@asynccontextmanager
async def fake_stages(
    num_stages: int,
    *,
    replicas: Sequence[int] = (),
    kind: type[FakeStage] = FakeStage,
    **fields: Any,
) -> AsyncIterator[list[FakeStage]]:
    """Starts that many stages of one pipeline, first stage first; `replicas` says how many there
    are of each, where it is not one."""
    network: dict[str, FakeStage] = {}
    stages = [
        kind(index=index, num_stages=num_stages, network=network, **fields)
        for index in range(num_stages)
        for _ in range(replicas[index] if replicas else 1)
    ]
    for stage in stages:
        await stage.start()
    try:
        yield stages
    finally:
        for stage in stages:
            await stage.stop()
