"""`python -m tests.support.quick_stages NUM`: stages that pace tokens and compute nothing.

Prints their addresses, with commas, and lives until standard input ends. They cost the
machine little, so that what the rest of a mesh costs can be measured at any rate of tokens.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from penstock.v1 import stage_pb2

from services.stage.session import REPORT_INTERVAL_S
from tests.support.fake_stages import FakeStage, fake_stages

TOKEN_ID = 42
FIELDS = {"num_kv_blocks": 65_536, "max_rows": 256, "context_length": 2048}


@dataclass
class QuickStage(FakeStage):
    """Takes as long as a fast stage would and samples always the same token."""

    seconds_a_batch: float = 2e-3
    seconds_a_row: float = 2e-4
    _report: stage_pb2.StageReport = field(default_factory=stage_pb2.StageReport)
    _report_due_s: float = 0.0

    async def _update(self, updates: stage_pb2.SequenceUpdates) -> None:
        """Keeps nothing."""

    async def _compute(
        self, batch: stage_pb2.MicroBatch
    ) -> AsyncIterator[stage_pb2.ControlResponse]:
        rows = sum(batch.num_rows)
        if self.index > 0:
            await self.inbox.get()
        seconds = self.seconds_a_batch + self.seconds_a_row * rows
        await asyncio.sleep(seconds)
        if self.downstream is not None:
            self.downstream.inbox.put_nowait((batch.id, []))
        else:
            sampled = stage_pb2.SampledTokens(micro_batch_id=batch.id)
            sampled.token_ids.extend([TOKEN_ID] * sum(batch.num_samples))
            yield stage_pb2.ControlResponse(sampled=sampled)
        self._report.batch_rows.append(rows)
        self._report.batch_compute_us.append(int(seconds * 1e6))
        if time.monotonic() >= self._report_due_s:
            yield stage_pb2.ControlResponse(report=self._report)
            self._report = stage_pb2.StageReport()
            self._report_due_s = time.monotonic() + REPORT_INTERVAL_S


async def main(num_stages: int) -> None:
    async with fake_stages(num_stages, kind=QuickStage, **FIELDS) as stages:
        print(",".join(stage.address for stage in stages), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
