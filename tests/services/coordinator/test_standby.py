"""Two coordinators for the same stages: one serves, the other one waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from core.errors import Superseded
from tests.services.coordinator.conftest import RunningCoordinator, coordinator
from tests.support.fake_engine import completion
from tests.support.fake_stages import FakeStage, fake_stages

DEADLINE_S = 20.0
PROMPT, NUM_TOKENS = [1, 2, 3], 10


@asynccontextmanager
async def two_coordinators() -> AsyncIterator[
    tuple[list[FakeStage], RunningCoordinator, RunningCoordinator]
]:
    async with (
        asyncio.timeout(DEADLINE_S),
        fake_stages(2) as stages,
        coordinator(stages) as first,
        coordinator(stages) as second,
    ):
        yield stages, first, second


async def test_a_coordinator_opens_no_stage_until_a_gateway_asks_it_to() -> None:
    async with two_coordinators() as (stages, first, second):
        async with first.gateway() as active, second.gateway(takes_over=False) as watching:
            await active.wait_until_ready()
            assert await active.generate(PROMPT, NUM_TOKENS) == completion(PROMPT, NUM_TOKENS)
            await watching.wait_for_mesh(lambda mesh: mesh.waiting)
            assert not active.mesh.waiting
            assert not watching.mesh.model.ready
        assert [len(stage.epochs) for stage in stages] == [1, 1]


async def test_the_one_that_had_the_stages_steps_back_and_refuses_nothing() -> None:
    async with (
        two_coordinators() as (stages, first, second),
        first.gateway() as old,
        second.gateway(takes_over=False) as new,
    ):
        await old.wait_until_ready()
        stages[1].may_compute.clear()
        request_id = await old.submit(PROMPT, NUM_TOKENS)
        await new.take_over()
        stages[1].may_compute.set()
        await old.until_the_stream_ends()
        assert not old.has_ended(request_id)
        with pytest.raises(Superseded):
            await first.running
        await new.wait_until_ready()
        assert await new.generate(PROMPT, NUM_TOKENS) == completion(PROMPT, NUM_TOKENS)


async def test_one_whose_term_is_over_does_not_get_the_stages_again() -> None:
    async with two_coordinators() as (stages, first, _), first.gateway() as gateway:
        await gateway.wait_until_ready()
        for stage in stages:
            stage.term += 1_000_000  # another one has taken over
            await stage.stop()
            await stage.restart()
        with pytest.raises(Superseded, match="its term is over"):
            await first.running
