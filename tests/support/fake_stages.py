"""Stages that compute a simple function instead of a model, behind real gRPC servers.

A fake stage performs orders in their order and refuses wrong ones as a real one would. It
passes token ids, for want of activations, to the next stage through a queue of this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc, tensor_pb2

from tests.support.fake_engine import EOS, VOCAB_SIZE, FakeEngine


@dataclass
class FakeStage(stage_pb2_grpc.StageServiceServicer):
    """One stage. Change its fields to misbehave."""

    index: int
    num_stages: int
    num_kv_blocks: int = 64
    max_rows: int = 64
    context_length: int = 512
    block_size: int = 16
    model: str = "fake"
    fingerprint: str = "f"
    seconds_a_batch: float = 0.0
    address: str = ""
    epochs: list[int] = field(default_factory=list)
    traceparents: dict[int, str] = field(default_factory=dict)
    num_batches: int = 0
    violations: list[str] = field(default_factory=list)
    inbox: asyncio.Queue[tuple[int, list[int]]] = field(default_factory=asyncio.Queue)
    downstream: FakeStage | None = None
    engine: FakeEngine = field(init=False)
    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    may_compute: asyncio.Event = field(default_factory=asyncio.Event)
    _updated: asyncio.Condition = field(default_factory=asyncio.Condition)
    _server: Any = None

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        stage_pb2_grpc.add_StageServiceServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        self.may_load.set()
        self.may_compute.set()
        await self._server.start()

    async def stop(self) -> None:
        """Dies as a killed process does: streams break at once."""
        await self._server.stop(0)

    async def restart(self) -> None:
        await self.start(int(self.address.rpartition(":")[2]))

    def __post_init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.engine = FakeEngine(
            num_kv_blocks=self.num_kv_blocks, is_last=self.is_last, block_size=self.block_size
        )
        self.inbox = asyncio.Queue()

    async def Control(
        self, requests: AsyncIterator[stage_pb2.ControlRequest], context: Any
    ) -> AsyncIterator[stage_pb2.ControlResponse]:
        self._clear()
        opened = await anext(aiter(requests))
        self.epochs.append(opened.open.epoch)
        await self.may_load.wait()
        yield stage_pb2.ControlResponse(ready=self._ready())
        async for request in requests:
            try:
                async for response in self._perform(request):
                    yield response
            except AssertionError as error:
                self.violations.append(str(error))
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    def _ready(self) -> stage_pb2.StageReady:
        return stage_pb2.StageReady(
            model=self.model,
            model_digest="d",
            first_layer=2 * self.index,
            end_layer=2 * self.index + 2,
            num_layers=2 * self.num_stages,
            hidden_size=8,
            vocab_size=VOCAB_SIZE,
            context_length=self.context_length,
            number_format="fp32",
            codec=tensor_pb2.CODEC_F32,
            kv_block_size=self.block_size,
            num_kv_blocks=self.num_kv_blocks,
            max_rows=self.max_rows,
            weights_bytes=1000 + self.index,
            bytes_read=900,
            numerics_fingerprint=self.fingerprint,
            eos_token_ids=[EOS],
        )

    async def _perform(
        self, request: stage_pb2.ControlRequest
    ) -> AsyncIterator[stage_pb2.ControlResponse]:
        match request.WhichOneof("order"):
            case "updates":
                await self._update(request.updates)
            case "micro_batch":
                await self.may_compute.wait()
                async for response in self._compute(request.micro_batch):
                    yield response

    async def until_it_holds_nothing(self) -> None:
        """Waits until every sequence has ended on this stage."""
        async with self._updated:
            await self._updated.wait_for(lambda: not self.engine.tables)

    async def _update(self, updates: stage_pb2.SequenceUpdates) -> None:
        for start in updates.starts:
            assert start.HasField("sampling") == self.is_last, "sampling is for the last stage"
            self.traceparents[start.request_id] = start.traceparent
        self.engine.apply(updates)
        async with self._updated:
            self._updated.notify_all()

    async def _compute(
        self, batch: stage_pb2.MicroBatch
    ) -> AsyncIterator[stage_pb2.ControlResponse]:
        await self._update(batch.updates)
        assert sum(batch.num_rows) <= self.max_rows, "too many rows"
        if self.index == 0:
            token_ids = list(batch.token_ids)
        else:
            micro_batch_id, token_ids = await self.inbox.get()
            assert micro_batch_id == batch.id, "activations of another micro-batch"
            assert not batch.token_ids, "token ids are for the first stage"
        if self.seconds_a_batch:
            await asyncio.sleep(self.seconds_a_batch)
        sampled = self.engine.run(
            batch.slots, batch.first_positions, batch.num_rows, batch.num_samples, token_ids
        )
        self.num_batches += 1
        if self.downstream is not None:
            self.downstream.inbox.put_nowait((batch.id, token_ids))
        yield stage_pb2.ControlResponse(report=self._report(len(token_ids)))
        if self.is_last:
            yield stage_pb2.ControlResponse(
                sampled=stage_pb2.SampledTokens(
                    micro_batch_id=batch.id, token_ids=sampled, sent_unix_ns=time.time_ns()
                )
            )

    def _report(self, rows: int) -> stage_pb2.StageReport:
        report = stage_pb2.StageReport(batch_rows=[rows], batch_compute_us=[1000 + 10 * rows])
        report.busy.FromMicroseconds(1000 + 10 * rows)
        report.starved.FromMicroseconds(500)
        return report


@asynccontextmanager
async def fake_stages(
    num_stages: int, *, kind: type[FakeStage] = FakeStage, **fields: Any
) -> AsyncIterator[list[FakeStage]]:
    """Starts that many stages of one pipeline."""
    stages = [kind(index=i, num_stages=num_stages, **fields) for i in range(num_stages)]
    for upstream, downstream in pairwise(stages):
        upstream.downstream = downstream
    for stage in stages:
        await stage.start()
    try:
        yield stages
    finally:
        for stage in stages:
            await stage.stop()
