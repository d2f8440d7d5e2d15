"""`python -m tests.support.quick_stages NUM`: stages that pace tokens and compute nothing.

Prints their addresses, with commas, and lives until standard input ends. They cost the
machine little, so that what the rest of a mesh costs can be measured at any rate of tokens.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass

from penstock.v1 import stage_pb2

from services.stage.session import REPORT_INTERVAL_S
from tests.support.fake_session import FakeSession
from tests.support.fake_stages import FakeStage, fake_stages

TOKEN_ID = 42
FIELDS = {"num_kv_blocks": 65_536, "max_rows": 256, "context_length": 2048}


@dataclass(eq=False)
class QuickStage(FakeStage):
    """Takes as long as a fast stage would and samples always the same token."""

    seconds_a_batch: float = 2e-3
    seconds_a_row: float = 2e-4

    def begin(self, epoch: int) -> FakeSession:
        return QuickSession(self, epoch)


class QuickSession(FakeSession):
    """Keeps nothing, and reports as seldom as a real stage."""

    def __init__(self, stage: QuickStage, epoch: int) -> None:
        super().__init__(stage, epoch)
        self._quick = stage
        self._news = stage_pb2.StageReport()
        self._report_due_s = 0.0

    async def update(self, updates: stage_pb2.SequenceUpdates) -> None: ...

    async def compute(self, batch: stage_pb2.MicroBatch) -> None:
        if batch.upstream_link:
            await self.activations(batch)
        rows = sum(batch.num_rows)
        seconds = self._quick.seconds_a_batch + self._quick.seconds_a_row * rows
        await asyncio.sleep(seconds)
        self.pass_on(batch, [], [TOKEN_ID] * sum(batch.num_samples))
        self._news.batch_rows.append(rows)
        self._news.batch_compute_us.append(int(seconds * 1e6))
        if time.monotonic() >= self._report_due_s:
            self.outbox.put_nowait(stage_pb2.ControlResponse(report=self._news))
            self._news = stage_pb2.StageReport()
            self._report_due_s = time.monotonic() + REPORT_INTERVAL_S


async def main(num_stages: int) -> None:
    async with fake_stages(num_stages, kind=QuickStage, **FIELDS) as stages:
        print(",".join(stage.address for stage in stages), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
