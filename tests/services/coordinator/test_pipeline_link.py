"""The link to the stages: how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from penstock.v1 import stage_pb2

from services.coordinator.pipeline_link import PipelineLink
from services.coordinator.settings import CoordinatorSettings
from tests.support.fake_stages import fake_stages

DEADLINE_S = 20.0


class Listener:
    """Waits for the pipeline; counts what is lost."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.num_lost = 0

    def on_stage_ready(self, stage_index: int, ready: stage_pb2.StageReady) -> None: ...

    def on_pipeline_ready(self, stages: Sequence[stage_pb2.StageReady]) -> None:
        self.ready.set()

    def on_sampled(self, message: stage_pb2.SampledTokens) -> None: ...

    def on_report(self, stage_index: int, report: stage_pb2.StageReport) -> None: ...

    def on_pipeline_lost(self, stage_index: int | None, reason: str) -> None:
        self.num_lost += 1


@pytest.mark.parametrize("fails_first", [True, False])
async def test_a_link_that_is_cancelled_while_its_pipeline_breaks_ends(fails_first: bool) -> None:
    listener = Listener()
    async with fake_stages(2) as stages, asyncio.timeout(DEADLINE_S):
        settings = CoordinatorSettings(
            listen="127.0.0.1:0", stages=tuple(stage.address for stage in stages)
        )
        link = PipelineLink(settings, listener)
        running = asyncio.create_task(link.run())
        await listener.ready.wait()
        if fails_first:
            link.drop("a test breaks it")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert listener.num_lost == 0
