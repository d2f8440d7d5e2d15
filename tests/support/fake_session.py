"""What a fake stage holds from OpenPipeline to the end of its stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from penstock.v1 import stage_pb2

from tests.support.changes import Changes
from tests.support.fake_engine import FakeEngine

if TYPE_CHECKING:
    from tests.support.fake_stages import FakeStage


class Row(NamedTuple):
    """A row of activations: its token, and what the sender's cache holds up to it."""

    token_id: int
    digest: int


class FakeSession:
    """One incarnation of a fake stage."""

    def __init__(self, stage: FakeStage, epoch: int) -> None:
        self.epoch = epoch
        self.outbox: asyncio.Queue[stage_pb2.ControlResponse | None] = asyncio.Queue()
        self.engine = FakeEngine(
            num_kv_blocks=stage.num_kv_blocks, is_last=stage.is_last, block_size=stage.block_size
        )
        self._stage = stage
        self._orders: asyncio.Queue[stage_pb2.ControlRequest] = asyncio.Queue()
        self._links: dict[int, FakeSession] = {}  # downstream
        self._arrived: dict[int, tuple[int, list[Row]]] = {}
        self._abandoned: set[int] = set()
        self._changes = Changes()
        self._performed_id = 0
        self._is_closed = False

    # --- the event loop's part: taken at once

    async def take_all(self, requests: AsyncIterator[stage_pb2.ControlRequest]) -> None:
        async for request in requests:
            await self._stage.may_answer.wait()
            match request.WhichOneof("order"):
                case "report":
                    self._report(rows=0)
                case "open_downstream":
                    self._open_link(request.open_downstream)
                case "abandon":
                    self._abandoned.update(request.abandon.ids)
                    self._changes.tell()
                case _:
                    self._orders.put_nowait(request)

    def _open_link(self, order: stage_pb2.OpenDownstream) -> None:
        other = self._stage.network.get(order.address)
        session = other.session if other is not None else None
        if not self._stage.may_link.is_set():
            self._say_link(order.link_id, problem="links are cut")
        elif session is None or session.epoch != order.epoch or session._is_closed:
            self._say_link(order.link_id, problem="nobody is there")
        else:
            self._links[order.link_id] = session
            self._say_link(order.link_id)

    def cut_links(self) -> None:
        for link_id in list(self._links):
            del self._links[link_id]
            self._say_link(link_id, problem="links are cut")

    def close(self) -> None:
        """What a broken stream does: the links to this session break, too."""
        self._is_closed = True
        self._changes.tell()
        for other in self._stage.network.values():
            if other.session is not None:
                other.session._forget(self)

    def _forget(self, downstream: FakeSession) -> None:
        for link_id, session in list(self._links.items()):
            if session is downstream:
                del self._links[link_id]
                self._say_link(link_id, problem="the other end is gone")

    def _say_link(self, link_id: int, *, problem: str = "") -> None:
        state = stage_pb2.LinkState(link_id=link_id, stands=not problem, problem=problem)
        self.outbox.put_nowait(stage_pb2.ControlResponse(link=state))

    def _report(self, *, rows: int) -> None:
        message = stage_pb2.StageReport(performed_id=self._performed_id)
        if rows:
            message.batch_rows.append(rows)
            message.batch_compute_us.append(1000 + 10 * rows)
            message.busy.FromMicroseconds(1000 + 10 * rows)
            message.starved.FromMicroseconds(500)
        self.outbox.put_nowait(stage_pb2.ControlResponse(report=message))

    async def until_it_holds_nothing(self) -> None:
        await self._changes.wait_until(lambda: self._is_closed or not self.engine.tables)

    async def until_closed(self) -> None:
        await self._changes.wait_until(lambda: self._is_closed)

    # --- the compute thread's part: in order

    async def perform_all(self) -> None:
        try:
            while True:
                request = await self._orders.get()
                if request.WhichOneof("order") == "updates":
                    await self.update(request.updates)
                else:
                    await self._stage.may_compute.wait()
                    await self.compute(request.micro_batch)
        except AssertionError as error:
            self._stage.violations.append(str(error))
            self.outbox.put_nowait(None)

    async def update(self, updates: stage_pb2.SequenceUpdates) -> None:
        for start in updates.starts:
            is_last = self._stage.is_last
            assert start.HasField("sampling") == is_last, "sampling is for the last stage"
            self._stage.traceparents[start.request_id] = start.traceparent
        self.engine.apply(updates)
        self._changes.tell()

    async def compute(self, batch: stage_pb2.MicroBatch) -> None:
        assert batch.id > self._performed_id, "micro-batches go backwards"
        await self.update(batch.updates)
        rows = await self._rows_of(batch)
        self._performed_id = batch.id
        if rows is None:
            return  # abandoned
        if self._stage.seconds_a_batch:
            await asyncio.sleep(self._stage.seconds_a_batch)
        tokens: list[int] = []
        if not batch.replays:
            assert len(rows) <= self._stage.max_rows, "too many rows"
            tokens = self.engine.run(
                batch.slots,
                batch.first_positions,
                batch.num_rows,
                batch.num_samples,
                [row.token_id for row in rows],
            )
            self._check(batch, rows)
            self._stage.num_batches += 1
            self._stage.num_rows += len(rows)
        self._report(rows=len(rows))
        self.pass_on(batch, self._own_rows(batch) if batch.downstream_link else [], tokens)

    async def _rows_of(self, batch: stage_pb2.MicroBatch) -> list[Row] | None:
        """The micro-batch's activations, once they have come; None where it is abandoned."""
        if not batch.upstream_link:
            assert batch.replays or self._stage.layers[0] == 0, "token ids are for the first stage"
            if not batch.replays:
                return [Row(token_id, 0) for token_id in batch.token_ids]
            rows = self._own_rows(batch)
            self._stage.num_replayed += len(rows)
            return rows
        assert not batch.token_ids, "token ids are for the first stage"
        return await self.activations(batch)

    async def activations(self, batch: stage_pb2.MicroBatch) -> list[Row] | None:
        """Waits for what comes from upstream; None when the micro-batch is abandoned."""
        await self._changes.wait_until(
            lambda: batch.id in self._arrived or batch.id in self._abandoned
        )
        link_id, rows = self._arrived.pop(batch.id, (0, []))
        if batch.id in self._abandoned:
            return None
        assert link_id == batch.upstream_link, "activations came over another link"
        return rows

    def _own_rows(self, batch: stage_pb2.MicroBatch) -> list[Row]:
        """The rows of a micro-batch as the cache has them."""
        rows = []
        runs = zip(batch.slots, batch.first_positions, batch.num_rows, strict=True)
        for slot, first, count in runs:
            digest = 0
            for position, token_id in enumerate(self.engine.prefix(slot, first + count)):
                digest = crc32(token_id.to_bytes(4), digest)
                if position >= first:
                    rows.append(Row(token_id, digest))
        return rows

    def _check(self, batch: stage_pb2.MicroBatch, rows: Sequence[Row]) -> None:
        if batch.upstream_link:
            assert self._own_rows(batch) == list(rows), "the caches of neighbours differ"

    def pass_on(self, batch: stage_pb2.MicroBatch, rows: list[Row], tokens: Sequence[int]) -> None:
        """Hands rows to the next replica of the path; the last one answers with the tokens."""
        if not batch.downstream_link:
            answer = stage_pb2.SampledTokens(
                micro_batch_id=batch.id, token_ids=tokens, sent_unix_ns=time.time_ns()
            )
            self.outbox.put_nowait(stage_pb2.ControlResponse(sampled=answer))
            return
        downstream = self._links.get(batch.downstream_link)
        if downstream is not None:  # else they go nowhere
            downstream._arrived[batch.id] = (batch.downstream_link, rows)
            downstream._changes.tell()
