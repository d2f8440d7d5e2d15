"""Two coordinators for the same stages: one serves, the other one waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from penstock.v1 import coordinator_pb2 as pb

from core.errors import Superseded
from services.coordinator.roster import Roster
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


async def test_the_one_that_takes_over_knows_what_was_written_while_it_waited(
    tmp_path: Path,
) -> None:
    """As after an update, of which the one that served was told."""
    path = tmp_path / "stages.json"
    async with (
        asyncio.timeout(DEADLINE_S),
        fake_stages(2, replicas=[1, 2]) as stages,
        coordinator(stages[:2], stages_file=path) as standby,
    ):
        first, old, new = (stage.address for stage in stages)
        path.write_text(Roster(stages=((first,), (new,))).to_json())
        async with standby.gateway() as gateway:
            await gateway.wait_until_ready()
            shown = [one.address for one in (await gateway.get_mesh()).stages]
            assert shown == [first, new]
        assert old not in shown


async def test_the_state_tells_which_one_serves_by_its_term() -> None:
    async with (
        two_coordinators() as (_, first, second),
        first.gateway() as active,
        second.gateway(takes_over=False) as watching,
    ):
        await active.wait_until_ready()
        terms = [(await gateway.get_mesh()).term for gateway in (active, watching)]
        assert terms[0] > 0
        assert terms[1] == 0
        await watching.take_over()
        await watching.wait_until_ready()
        assert (await watching.get_mesh()).term > terms[0]


async def test_nothing_leaves_before_gateways_could_bring_what_began_there() -> None:
    """Though the stages were not whole for longer than they have for it."""
    late_s = 0.0
    async with asyncio.timeout(DEADLINE_S), fake_stages(2, replicas=[1, 2]) as stages:
        stages[0].may_load.clear()
        leaving = stages[2].address
        async with (
            coordinator(
                stages, resume_grace_s=100.0, clock=lambda: time.monotonic() + late_s
            ) as running,
            running.gateway() as gateway,
        ):
            drain = gateway.stub.DrainReplica(pb.DrainReplicaRequest(address=leaving))
            await drain.read()
            late_s += 1000.0
            pulses = gateway.stub.Connect()
            for _ in range(3):  # after which it has looked for what may leave
                await pulses.read()
            stages[0].may_load.set()
            await gateway.wait_until_ready()
            assert leaving in [one.address for one in (await gateway.get_mesh()).stages]
            late_s += 1000.0
            assert await drain.read() is grpc.aio.EOF
