"""Requests go on when replicas and links die, with the tokens that they would have had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest

from tests.services.coordinator.conftest import Mesh, coordinator, mesh
from tests.support.fake_engine import completion
from tests.support.fake_stages import fake_stages

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
PROMPTS = [list(range(start, start + 2 * start)) for start in range(1, 9)]
NUM_TOKENS = 60


@asynccontextmanager
async def generating(m: Mesh) -> AsyncIterator[None]:
    """Several streams, each past its first token; all of them must end right, and leave nothing."""
    requests = [await m.gateway.submit(prompt, NUM_TOKENS) for prompt in PROMPTS]
    firsts = [list((await m.gateway.next_update(request)).token_ids) for request in requests]
    yield
    for prompt, request, first in zip(PROMPTS, requests, firsts, strict=True):
        rest, last = await m.gateway.finish(request)
        assert not last.HasField("refusal"), last.refusal.message
        assert first + rest == completion(prompt, NUM_TOKENS)
    await m.until_all_blocks_are_free()


@pytest.mark.parametrize("dies", range(3))
async def test_a_stage_that_dies_alone_is_waited_for(dies: int) -> None:
    async with mesh(3, seconds_a_batch=0.002) as m, generating(m):
        await m.stages[dies].stop()
        await m.gateway.wait_for_mesh(lambda state: not state.model.ready)
        assert not m.gateway.mesh.stages_ready[dies]
        assert m.stages[dies].address in (await m.gateway.get_mesh()).stages[dies].problem
        await m.stages[dies].restart()
        await m.gateway.wait_until_ready()


async def test_where_none_comes_back_every_stream_ends_and_is_told_when_to_try_again() -> None:
    async with mesh(2, seconds_a_batch=0.002, lost_limit_s=0.3) as m:
        requests = [await m.gateway.submit(prompt, NUM_TOKENS) for prompt in PROMPTS]
        for request in requests:
            await m.gateway.next_update(request)
        await m.stages[1].stop()
        for request in requests:
            _, last = await m.gateway.finish(request)
            assert last.refusal.code == UNAVAILABLE
            assert last.refusal.HasField("retry_delay")
        assert (await m.gateway.refusal([1])).code == UNAVAILABLE


@pytest.mark.parametrize("dies", range(6))
async def test_another_replica_takes_over(dies: int) -> None:
    async with (
        mesh(3, replicas=[2, 2, 2], seconds_a_batch=0.002) as m,
        generating(m),
    ):
        await m.stages[dies].stop()


@pytest.mark.parametrize("dies", range(3))
async def test_a_spare_computes_only_when_it_is_needed(dies: int) -> None:
    async with mesh(3, replicas=[2, 2, 2], spares=[1, 3, 5], seconds_a_batch=0.002) as m:
        spare = m.stages[2 * dies + 1]
        async with generating(m):
            assert spare.num_batches == 0
            await m.stages[2 * dies].stop()
        assert spare.num_batches > 0
        state = await m.gateway.get_mesh()
        assert state.sequences_moved >= len(PROMPTS)
        assert state.positions_restored > 0


async def test_a_link_that_breaks_loses_nothing() -> None:
    async with mesh(2, seconds_a_batch=0.002) as m, generating(m):
        m.stages[0].cut_links()
        await m.gateway.wait_for_mesh(lambda state: not state.model.ready)
        m.stages[0].may_link.set()


async def test_a_replica_that_falls_silent_is_left_behind() -> None:
    async with (
        mesh(2, replicas=[1, 2], seconds_a_batch=0.002, pulse_timeout_s=0.2) as m,
        generating(m),
    ):
        m.stages[1].may_answer.clear()


async def test_a_replica_that_stops_computing_is_opened_again() -> None:
    async with mesh(2, seconds_a_batch=0.002, micro_batch_timeout_s=0.3) as m, generating(m):
        m.stages[1].may_compute.clear()
        await m.gateway.wait_for_mesh(lambda state: not state.model.ready)
        m.stages[1].may_compute.set()


async def test_everything_may_die_one_after_the_other() -> None:
    async with mesh(2, replicas=[2, 2], seconds_a_batch=0.005) as m, generating(m):
        for stage in m.stages:
            await stage.stop()
            await asyncio.sleep(0.02)
            await stage.restart()
            await m.gateway.until_all_are_ready()


async def test_a_stage_is_healthy_while_one_of_its_replicas_is() -> None:
    async with mesh(2, replicas=[1, 2]) as m:
        await m.stages[1].stop()
        await until_ready(m, [True, False, True])
        assert list(m.gateway.mesh.stages_ready) == [True, True]
        assert m.gateway.mesh.model.ready
        await m.stages[2].stop()
        await m.gateway.wait_for_mesh(lambda state: list(state.stages_ready) == [True, False])
        assert not m.gateway.mesh.model.ready
        await m.stages[1].restart()
        await m.gateway.wait_for_mesh(lambda state: state.model.ready)


async def until_ready(m: Mesh, ready: Sequence[bool]) -> None:
    while [one.ready for one in (await m.gateway.get_mesh()).stages] != list(ready):
        pass


async def test_output_of_another_coordinator_goes_on_and_is_not_sent_again() -> None:
    prompt = [5, 6, 7]
    expected = completion(prompt, 30)
    async with mesh(2) as m:
        request = await m.gateway.submit([*prompt, *expected[:10]], 30, num_output_tokens=10)
        tokens, last = await m.gateway.finish(request)
        assert tokens == expected[10:]
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 30)


async def test_output_without_a_prompt_is_refused() -> None:
    async with mesh(1) as m:
        _, last = await m.gateway.finish(await m.gateway.submit([5], 30, num_output_tokens=1))
        assert "num_output_tokens" in last.refusal.message


async def test_a_mesh_that_never_was_ready_refuses_at_once() -> None:
    async with fake_stages(2) as stages:
        stages[1].may_load.clear()
        async with coordinator(stages) as running, running.gateway() as gateway:
            await gateway.wait_for_mesh(lambda state: list(state.stages_ready) == [True, False])
            refusal = await gateway.refusal([1])
            assert refusal.code == UNAVAILABLE
            assert refusal.HasField("retry_delay")
