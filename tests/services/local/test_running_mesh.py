"""Changes of a mesh whose coordinators take over from each other: real ones, over fake stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from penstock.v1 import coordinator_pb2 as pb

from core.errors import Unavailable
from services.local.coordinators import open_coordinators
from services.local.running_mesh import RunningMesh
from tests.services.coordinator.conftest import RunningCoordinator, coordinator
from tests.support.fake_engine import completion
from tests.support.fake_stages import FakeStage, fake_stages

DEADLINE_S = 20.0
PROMPT = [1, 2, 3]


@asynccontextmanager
async def seen_from_outside(*coordinators: RunningCoordinator) -> AsyncIterator[RunningMesh]:
    addresses = [one.address for one in coordinators]
    async with open_coordinators(addresses, credentials=None) as opened:
        yield RunningMesh(
            coordinators=opened, supervisor=None, gateway=None, key=None, say=lambda _: None
        )


@asynccontextmanager
async def updated_stage() -> AsyncIterator[Sequence[FakeStage]]:
    """A first stage, and of the second one two replicas: with old weights, and with new ones."""
    async with asyncio.timeout(DEADLINE_S), fake_stages(2, replicas=[1, 2]) as stages:
        stages[2].weights = "v"
        yield stages


async def choose_new(stub: Any) -> None:
    await stub.ChooseWeights(pb.ChooseWeightsRequest(stage_index=1, weights_digest="v1"))


async def test_while_all_wait_none_serves() -> None:
    async with (
        updated_stage() as stages,
        coordinator(stages) as only,
        seen_from_outside(only) as mesh,
    ):
        with pytest.raises(Unavailable, match="no coordinator serves yet"):
            await mesh.describe()


async def test_the_one_that_took_over_last_is_asked() -> None:
    async with (
        updated_stage() as stages,
        coordinator(stages[:2]) as first,
        coordinator(stages[:2]) as second,
        seen_from_outside(first, second) as mesh,
    ):
        async with first.gateway() as gateway:
            await gateway.wait_until_ready()
            term = (await mesh.describe()).term
        async with second.gateway() as gateway:
            await gateway.wait_until_ready()
            assert (await mesh.describe()).term > term


async def test_one_that_took_over_unaware_of_new_replicas_is_told_of_them() -> None:
    """As where it did a moment before they were the mesh's own."""
    async with (
        updated_stage() as stages,
        coordinator(stages[:2]) as first,
        coordinator(stages[:2]) as second,
        seen_from_outside(first, second) as mesh,
    ):
        new = pb.AddReplicaRequest(stage_index=1, address=stages[2].address)
        async with first.gateway() as gateway:
            await gateway.wait_until_ready()
            await mesh.add(new)
            await mesh.until_ready([new.address])
        async with second.gateway() as gateway:
            await gateway.wait_until_ready()
            await mesh.choose(choose_new, new=[new])
            before = stages[2].num_batches
            assert await gateway.generate(PROMPT, 5) == completion(PROMPT, 5)
            assert stages[2].num_batches >= before + 5


async def test_where_the_coordinator_is_lost_the_next_one_lets_the_replica_leave() -> None:
    async with (
        updated_stage() as stages,
        AsyncExitStack() as life_of_the_first,
        coordinator(stages) as second,
    ):
        first = await life_of_the_first.enter_async_context(coordinator(stages))
        async with seen_from_outside(first, second) as mesh:
            async with first.gateway() as gateway:
                await gateway.until_all_are_ready()
                stages[2].may_compute.clear()
                await gateway.submit(PROMPT, 5)
                leaving = asyncio.create_task(mesh.drain(stages[2].address))
                while not any(one.draining for one in (await gateway.get_mesh()).stages):
                    pass
            await life_of_the_first.aclose()
            stages[2].may_compute.set()
            async with second.gateway() as gateway:
                await leaving
                addresses = [one.address for one in (await gateway.get_mesh()).stages]
                assert stages[2].address not in addresses
