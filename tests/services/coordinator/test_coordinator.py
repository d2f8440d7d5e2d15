"""The coordinator over real gRPC, against stages that compute a checkable function."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from penstock.v1 import generation_pb2

from tests.services.coordinator.conftest import Gateway, coordinator, mesh
from tests.support.fake_engine import completion
from tests.support.fake_stages import fake_stages

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_generates_the_tokens_of_the_model_through_three_stages() -> None:
    async with mesh(3) as m:
        prompt = list(range(1, 100))
        assert await m.gateway.generate(prompt, 20) == completion(prompt, 20)
        await m.until_all_blocks_are_free()


async def test_concurrent_requests_of_two_gateways_do_not_mix() -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(1, 1000) for _ in range(rng.randrange(1, 60))] for _ in range(40)]
    async with mesh(2) as m, m.coordinator.gateway() as second:
        await second.wait_until_ready()
        gateways: list[Gateway] = [m.gateway, second] * 20
        answers = await asyncio.gather(
            *(g.generate(p, 60) for g, p in zip(gateways, prompts, strict=True))
        )
        assert answers == [completion(prompt, 60) for prompt in prompts]
        await m.until_all_blocks_are_free()
        # 64 blocks hold a third of them at a time.
        assert m.coordinator.conductor.scheduler.num_preemptions > 0


async def test_a_cancelled_request_frees_its_blocks_while_others_go_on() -> None:
    async with mesh(2) as m:
        dropped = await m.gateway.submit([1, 2, 3], 400)
        kept = await m.gateway.submit([4, 5, 6], 30)
        await m.gateway.next_update(dropped)
        await m.gateway.cancel(dropped)
        _, last = await m.gateway.finish(dropped)
        assert last.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
        assert last.usage.prompt_tokens == 3
        assert (await m.gateway.finish(kept))[0] == completion([4, 5, 6], 30)
        await m.until_all_blocks_are_free()


async def test_rows_of_a_cancelled_request_leave_within_two_micro_batches() -> None:
    async with mesh(2, seconds_a_batch=0.005) as m:
        request = await m.gateway.submit([1, 2, 3], 400)
        await m.gateway.next_update(request)
        await m.gateway.cancel(request)
        await m.gateway.finish(request)
        batches = m.stages[0].num_batches
        await m.until_all_blocks_are_free()
        assert m.stages[0].num_batches <= batches + 2


async def test_a_gateway_that_goes_away_frees_what_it_held() -> None:
    async with mesh(2) as m:
        async with m.coordinator.gateway() as leaving:
            for start in range(1, 9):
                request = await leaving.submit([start], 400)
            await leaving.next_update(request)
        await m.until_all_blocks_are_free()
        assert m.coordinator.conductor.scheduler.num_running == 0


async def test_a_request_whose_deadline_passes_ends_and_frees_its_blocks() -> None:
    async with mesh(2, seconds_a_batch=0.01) as m:
        tokens, last = await m.gateway.finish(await m.gateway.submit([1], 400, timeout_s=0.2))
        assert last.refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert tokens == completion([1], 400)[: len(tokens)]
        await m.until_all_blocks_are_free()


async def test_stop_tokens_end_a_completion_and_usage_is_counted() -> None:
    prompt = [7, 8, 9]
    expected = completion(prompt, 10)
    async with mesh(1) as m:
        request = await m.gateway.submit(prompt, 10, stop_token_ids=[expected[4]])
        tokens, last = await m.gateway.finish(request)
        assert tokens == expected[:5]
        assert last.finish_reason == generation_pb2.FINISH_REASON_STOP
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 5)
        assert last.usage.decode_duration.ToNanoseconds() > 0


async def test_wrong_requests_are_refused_and_others_go_on() -> None:
    async with mesh(2) as m:
        for token_ids, max_tokens in (([], 8), ([1000], 8), ([1], 512), ([1] * 512, 1), ([1], 0)):
            refusal = await m.gateway.refusal(token_ids, max_tokens)
            assert refusal.code == INVALID_ARGUMENT
            assert not refusal.HasField("retry_delay")
        assert await m.gateway.generate([1], 5) == completion([1], 5)


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": -0.0},
        {"temperature": -1.0},
        {"min_p": 1e38},
        {"repetition_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logprobs": 21},
        {"stop_token_ids": [1000]},
        {"stop_token_ids": [1] * 65},
    ],
)
async def test_sampling_that_a_stage_would_refuse_reaches_none(sampling: dict[str, Any]) -> None:
    async with mesh(1) as m:
        running = await m.gateway.submit([1], 8)
        refused = await m.gateway.submit([2], 8, **sampling)
        _, last = await m.gateway.finish(refused)
        assert last.refusal.code == INVALID_ARGUMENT
        assert next(iter(sampling)) in last.refusal.message
        assert (await m.gateway.finish(running))[0] == completion([1], 8)


async def test_a_full_queue_refuses_with_a_retry_delay() -> None:
    async with mesh(1, seconds_a_batch=0.02, max_sequences=1, max_waiting=1) as m:
        await m.gateway.next_update(await m.gateway.submit([1], 200))
        await m.gateway.submit([2], 5)
        refusal = await m.gateway.refusal([3])
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert refusal.retry_delay.ToNanoseconds() > 0


async def test_stages_that_do_not_fit_are_not_used() -> None:
    async with fake_stages(2) as stages:
        stages[1].fingerprint = "another"
        async with coordinator(stages) as running, running.gateway() as gateway:
            while not any(
                "numerics_fingerprint" in one.problem for one in (await gateway.get_mesh()).stages
            ):
                pass
            assert (await gateway.refusal([1])).code == UNAVAILABLE
            stages[0].fingerprint = stages[1].fingerprint = "f"
            await stages[0].stop()
            await stages[1].stop()
            await stages[0].restart()
            await stages[1].restart()
            await gateway.wait_until_ready()


async def test_each_stage_becomes_healthy_when_it_is_ready() -> None:
    async with fake_stages(2) as stages:
        stages[1].may_load.clear()
        async with coordinator(stages) as running, running.gateway() as gateway:
            await gateway.wait_for_mesh(lambda state: list(state.stages_ready) == [True, False])
            assert not gateway.mesh.model.ready
            stages[1].may_load.set()
            for name in ("fake/stage/1", "fake/stage/0", "fake", ""):
                await until_serving(running.address, name)


async def until_serving(address: str, name: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=name)
        )
        async for response in watch:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                break


async def test_the_mesh_is_described_with_rates_of_the_last_seconds() -> None:
    async with mesh(2) as m:
        await m.gateway.generate([1, 2, 3], 50)
        state = await m.gateway.get_mesh()
        assert state.model.name == "fake"
        assert state.model.vocab_size == 1000
        assert [s.address for s in state.stages] == [s.address for s in m.stages]
        assert [(s.first_layer, s.end_layer) for s in state.stages] == [(0, 2), (2, 4)]
        assert [s.kv_blocks_total for s in state.stages] == [64, 64]
        assert [s.kv_blocks_used for s in state.stages] == [0, 0]
        assert all(0 < s.busy_fraction < 1 for s in state.stages)
        assert all(s.starved_fraction > 0 for s in state.stages)
        assert all(s.rows_per_second > 0 for s in state.stages)
        assert state.tokens_per_second > 0
        assert state.uptime.ToNanoseconds() > 0


async def test_a_prompt_is_found_again_by_requests_of_equal_salt_only() -> None:
    prompt = list(range(1, 50))
    async with mesh(2) as m:
        for salt, num_cached in (("", 0), ("", 48), ("one", 0), ("one", 48), ("two", 0)):
            tokens, last = await m.gateway.finish(
                await m.gateway.submit(prompt, 4, cache_salt=salt)
            )
            assert tokens == completion(prompt, 4)
            assert last.usage.cached_tokens == num_cached
        state = await m.gateway.get_mesh()
        assert (state.prompt_tokens, state.cached_tokens) == (5 * 49, 2 * 48)
        await m.until_all_blocks_are_free()


async def test_no_prompt_is_found_again_where_that_is_turned_off() -> None:
    prompt = list(range(1, 50))
    async with mesh(2, prefix_cache=False) as m:
        for _ in range(2):
            tokens, last = await m.gateway.finish(await m.gateway.submit(prompt, 4))
            assert tokens == completion(prompt, 4)
            assert last.usage.cached_tokens == 0


async def test_the_way_back_of_sampled_tokens_is_measured() -> None:
    async with mesh(2) as m:
        await m.gateway.generate([1, 2, 3], 5)
        assert m.coordinator.conductor.mesh.return_wire_s > 0


async def test_traceparent_reaches_every_stage() -> None:
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    async with mesh(2) as m:
        await m.gateway.finish(await m.gateway.submit([1], 2, traceparent=parent))
        assert [list(stage.traceparents.values()) for stage in m.stages] == [[parent], [parent]]


async def test_stopping_ends_the_streams_and_leaves_requests_to_their_gateways() -> None:
    async with mesh(2) as m:
        request = await m.gateway.submit([1], 400)
        await m.gateway.next_update(request)
        await m.coordinator.conductor.stop()
        await m.gateway.until_the_stream_ends()
        assert not m.coordinator.health.is_serving("")
        assert not m.gateway.has_ended(request)


async def test_an_unknown_cancellation_is_ignored() -> None:
    async with mesh(1) as m:
        await m.gateway.cancel(99)
        assert await m.gateway.generate([5], 3) == completion([5], 3)


async def test_a_reused_request_number_is_refused_and_the_first_goes_on() -> None:
    async with mesh(1, seconds_a_batch=0.01) as m:
        request = await m.gateway.submit([1], 20)
        first = await m.gateway.next_update(request)
        await m.gateway.submit([2], 3, request_id=request)
        tokens, refused = await m.gateway.finish(request)
        assert refused.refusal.code == INVALID_ARGUMENT
        rest, last = await m.gateway.finish(request)
        assert last.finish_reason == generation_pb2.FINISH_REASON_LENGTH
        assert [*first.token_ids, *tokens, *rest] == completion([1], 20)
