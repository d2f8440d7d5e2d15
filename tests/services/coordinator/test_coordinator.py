"""The coordinator over real gRPC, against stages that compute a checkable function."""

from __future__ import annotations

import asyncio
import random

import grpc
from penstock.v1 import generation_pb2

from tests.services.coordinator.conftest import Gateway, RunningCoordinator, coordinator
from tests.support.fake_stages import EOS, FakeStage, completion, fake_stages


async def all_blocks_are_free(running: RunningCoordinator, stages: list[FakeStage]) -> None:
    """Waits until the stages' mirrors are empty too; the test's limit bounds it."""
    while any(stage.num_blocks_held for stage in stages):
        await asyncio.sleep(0.005)
    assert running.conductor.scheduler.kv_blocks_used_S == [0] * len(stages)
    assert [stage.violations for stage in stages] == [[] for _ in stages]


async def test_generates_the_tokens_of_the_model_through_three_stages() -> None:
    async with fake_stages(3) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            prompt = list(range(1, 100))
            assert await gateway.generate(prompt, 20) == completion(prompt, 20)
            await all_blocks_are_free(running, stages)


async def test_concurrent_requests_of_two_gateways_do_not_mix() -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(1, 1000) for _ in range(rng.randrange(1, 60))] for _ in range(40)]
    # 64 blocks hold a third of them at a time, so that some wait and some are preempted.
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as one, running.gateway() as two:
            await one.wait_until_ready()
            await two.wait_until_ready()
            gateways: list[Gateway] = [one, two] * 20
            answers = await asyncio.gather(
                *(g.generate(p, 60) for g, p in zip(gateways, prompts, strict=True))
            )
            assert answers == [completion(prompt, 60) for prompt in prompts]
            await all_blocks_are_free(running, stages)
            assert running.conductor.scheduler.num_preemptions > 0


async def test_a_cancelled_request_frees_its_blocks_while_others_go_on() -> None:
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            dropped = await gateway.submit([1, 2, 3], 400)
            kept = await gateway.submit([4, 5, 6], 30)
            await gateway.next_update(dropped)
            await gateway.cancel(dropped)
            _, last = await gateway.finish(dropped)
            assert last.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
            assert last.usage.prompt_tokens == 3
            assert (await gateway.finish(kept))[0] == completion([4, 5, 6], 30)
            await all_blocks_are_free(running, stages)


async def test_cancelling_the_only_request_frees_its_blocks_on_the_stages() -> None:
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            request = await gateway.submit([1, 2, 3], 400)
            await gateway.next_update(request)
            batches = stages[-1].num_batches
            await gateway.cancel(request)
            await gateway.finish(request)
            await all_blocks_are_free(running, stages)
            # One may have been computed while the cancellation travelled, one been in flight.
            assert stages[-1].num_batches <= batches + 20


async def test_a_gateway_that_goes_away_frees_what_it_held() -> None:
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            for start in range(1, 9):
                request = await gateway.submit([start], 400)
            await gateway.next_update(request)
        await all_blocks_are_free(running, stages)
        assert running.conductor.scheduler.num_running == 0


async def test_a_request_whose_deadline_passes_ends_and_frees_its_blocks() -> None:
    async with fake_stages(2, seconds_a_batch=0.01) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            tokens, last = await gateway.finish(await gateway.submit([1], 400, timeout_s=0.2))
            assert last.refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
            assert tokens == completion([1], 400)[: len(tokens)]
            await all_blocks_are_free(running, stages)


async def test_stop_tokens_and_usage() -> None:
    prompt = [7, 8, 9]
    expected = completion(prompt, 10)
    async with fake_stages(1) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            request = await gateway.submit(prompt, 10, stop_token_ids=[expected[4]])
            tokens, last = await gateway.finish(request)
            assert tokens == expected[:5]
            assert last.finish_reason == generation_pb2.FINISH_REASON_STOP
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 5)
            assert last.usage.decode_duration.ToNanoseconds() > 0


async def test_wrong_requests_are_refused_and_others_go_on() -> None:
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
            for token_ids, max_tokens in (([], 8), ([1000], 8), ([1], 512), ([1] * 512, 1)):
                _, last = await gateway.finish(await gateway.submit(token_ids, max_tokens))
                assert last.finish_reason == generation_pb2.FINISH_REASON_ERROR
                assert last.refusal.code == invalid, last
            assert await gateway.generate([1], 5) == completion([1], 5)


async def test_a_full_queue_refuses_with_a_retry_delay() -> None:
    async with (
        fake_stages(1, seconds_a_batch=0.02) as stages,
        coordinator(stages, max_sequences=1, max_waiting=1) as running,
    ):
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            first = await gateway.submit([1], 200)
            await gateway.next_update(first)
            await gateway.submit([2], 5)
            refused = await gateway.submit([3], 5)
            _, last = await gateway.finish(refused)
            assert last.refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert last.refusal.retry_delay.ToNanoseconds() > 0


async def test_a_lost_stage_refuses_open_requests_and_the_pipeline_comes_back() -> None:
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            request = await gateway.submit([1, 2], 450)
            await gateway.next_update(request)
            await stages[1].stop()
            _, last = await gateway.finish(request)
            assert last.refusal.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert last.refusal.HasField("retry_delay")
            await gateway.wait_for_mesh(lambda mesh: not mesh.model.ready)
            _, refused = await gateway.finish(await gateway.submit([1], 5))
            assert refused.refusal.code == grpc.StatusCode.UNAVAILABLE.value[0]
            mesh = await gateway.get_mesh()
            assert not mesh.model.ready
            assert stages[1].address in mesh.stages[1].problem
            assert not running.health.is_serving("fake")
            await stages[1].restart()
            await gateway.wait_until_ready()
            assert await gateway.generate([1], 5) == completion([1], 5)
            assert stages[1].epochs == sorted(set(stages[1].epochs))
            assert stages[0].epochs[-1] == stages[1].epochs[-1]


async def test_a_stage_that_stops_computing_is_treated_as_lost() -> None:
    async with (
        fake_stages(2) as stages,
        coordinator(stages, micro_batch_timeout_s=0.3) as running,
    ):
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            stages[0].is_frozen = True
            _, last = await gateway.finish(await gateway.submit([1], 5))
            assert last.refusal.code == grpc.StatusCode.UNAVAILABLE.value[0]
            stages[0].is_frozen = False
            await gateway.wait_for_mesh(lambda mesh: not mesh.model.ready)
            await gateway.wait_until_ready()
            assert await gateway.generate([1], 5) == completion([1], 5)


async def test_stages_that_do_not_fit_are_not_used() -> None:
    async with fake_stages(2) as stages:
        stages[1].fingerprint = "another"
        async with coordinator(stages) as running, running.gateway() as gateway:
            while "numerics_fingerprint" not in (await gateway.get_mesh()).stages[1].problem:
                await asyncio.sleep(0.01)
            _, last = await gateway.finish(await gateway.submit([1], 5))
            assert last.refusal.code == grpc.StatusCode.UNAVAILABLE.value[0]
            stages[1].fingerprint = "f"
            await gateway.wait_until_ready()


async def test_each_stage_becomes_healthy_when_it_is_ready() -> None:
    async with fake_stages(2) as stages:
        stages[1].ready_gate.clear()
        async with coordinator(stages) as running, running.gateway() as gateway:
            await gateway.wait_for_mesh(lambda mesh: list(mesh.stages_ready) == [True, False])
            assert not gateway.mesh.model.ready
            stages[1].ready_gate.set()
            await gateway.wait_until_ready()
            while not running.health.is_serving("fake/stage/1"):
                await asyncio.sleep(0.005)
            assert running.health.is_serving("fake")
            assert running.health.is_serving("")


async def test_the_mesh_is_described_with_rates_of_the_last_seconds() -> None:
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            await gateway.generate([1, 2, 3], 50)
            mesh = await gateway.get_mesh()
            assert mesh.model.name == "fake"
            assert mesh.model.vocab_size == 1000
            assert [s.address for s in mesh.stages] == [s.address for s in stages]
            assert [(s.first_layer, s.end_layer) for s in mesh.stages] == [(0, 2), (2, 4)]
            assert [s.kv_blocks_total for s in mesh.stages] == [64, 64]
            assert [s.kv_blocks_used for s in mesh.stages] == [0, 0]
            assert all(0 < s.busy_fraction < 1 for s in mesh.stages)
            assert all(s.starved_fraction > 0 for s in mesh.stages)
            assert all(s.rows_per_second > 0 for s in mesh.stages)
            assert mesh.tokens_per_second > 0
            assert mesh.uptime.ToNanoseconds() > 0


async def test_traceparent_reaches_every_stage() -> None:
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            await gateway.finish(await gateway.submit([1], 2, traceparent=parent))
            assert [list(stage.traceparents.values()) for stage in stages] == [[parent], [parent]]


async def test_stopping_refuses_what_is_open_and_ends_the_streams() -> None:
    async with fake_stages(2) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            request = await gateway.submit([1], 400)
            await gateway.next_update(request)
            await running.conductor.stop()
            _, last = await gateway.finish(request)
            assert last.refusal.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert not running.health.is_serving("")


async def test_eos_ends_a_completion_unless_it_is_ignored() -> None:
    assert EOS not in completion([1], 50)
    async with fake_stages(1) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            request = await gateway.submit([1], 5, ignore_eos=True)
            tokens, last = await gateway.finish(request)
            assert last.finish_reason == generation_pb2.FINISH_REASON_LENGTH
            assert len(tokens) == 5


async def test_an_unknown_cancellation_is_ignored() -> None:
    async with fake_stages(1) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            await gateway.cancel(99)
            assert await gateway.generate([5], 3) == completion([5], 3)


async def test_a_reused_request_number_is_refused() -> None:
    async with fake_stages(1, seconds_a_batch=0.01) as stages, coordinator(stages) as running:
        async with running.gateway() as gateway:
            await gateway.wait_until_ready()
            request = await gateway.submit([1], 400)
            await gateway.next_update(request)
            gateway._next_id = request
            await gateway.submit([2], 3)
            update = await gateway.next_update(request)
            assert update.refusal.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
