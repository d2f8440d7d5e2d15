"""Chains of stages, over shortcuts and over gRPC alone: rows in, activations across, tokens out."""

from __future__ import annotations

import asyncio

import grpc
from penstock.v1 import stage_pb2

from services.common.shortcut import Shortcut, enter
from tests.support.stages import (
    TIMEOUT_S,
    HandDrivenCoordinator,
    both_ways,
    micro_batch,
    running_chain,
    start,
)

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@both_ways
async def test_a_chain_computes_prefill_and_decode_in_order(offers_shortcuts: bool) -> None:
    async with (
        running_chain(3, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages) as coordinator,
    ):
        readies = await coordinator.open()
        assert [ready.first_layer for ready in readies] == [0, 1, 2]
        starts = [start(3), start(5)]
        await coordinator.run(micro_batch(1, {3: [10, 11, 12], 5: [20]}, starts=starts))
        await coordinator.run(micro_batch(2, {5: [21]}, first_position=1))
        first, second = await coordinator.sampled(), await coordinator.sampled()
    assert (first.micro_batch_id, second.micro_batch_id) == (1, 2)
    # token + position of each run's last row + one a stage
    assert list(first.token_ids) == [12 + 2 + 3, 20 + 0 + 3]
    assert list(second.token_ids) == [21 + 1 + 3]
    assert [entry.HasField("chosen") for entry in first.logprobs] == [True, True]
    assert first.logprobs[0].top[0].token_id == 1
    for stage in stages:
        assert stage.engine.steps == [1, 2]
        assert len(stage.engine.threads) == 1


@both_ways
async def test_a_micro_batch_of_many_frames_arrives_whole(offers_shortcuts: bool) -> None:
    hidden_size = 4096  # 64 rows of float32 fill a frame
    async with (
        running_chain(2, hidden_size=hidden_size, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages) as coordinator,
    ):
        await coordinator.open()
        await coordinator.run(micro_batch(1, {0: range(300)}, starts=[start(0)]))
        sampled = await coordinator.sampled()
    assert list(sampled.token_ids) == [299 + 299 + 2]


@both_ways
async def test_a_slow_stage_holds_the_one_before_it_and_nothing_is_lost(
    offers_shortcuts: bool,
) -> None:
    async with (
        running_chain(2, initial_credits=2, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages) as coordinator,
    ):
        await coordinator.open()
        stages[1].engine.gate.clear()
        count = 20
        await coordinator.run(micro_batch(1, {0: [1]}, starts=[start(0)]))
        for id in range(2, count + 1):
            await coordinator.run(micro_batch(id, {0: [id]}, first_position=id - 1))
        # Two frames hold the credits and two wait for credit: then the first stage holds back.
        # It answers reports, but only a stage that went on computing would ever pass 4.
        for _ in range(5):
            await coordinator.controls[0].send(report=stage_pb2.ReportRequest())
            await coordinator.controls[0].next("report")
        assert len(stages[0].engine.steps) <= 4
        stages[1].engine.gate.set()
        tokens = [list((await coordinator.sampled()).token_ids) for _ in range(count)]
    assert tokens == [[id + id - 1 + 2] for id in range(1, count + 1)]


async def test_orders_and_tokens_may_travel_over_the_shortcut() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages) as coordinator:
        (ready,) = await coordinator.open()
        connection = enter(ready.shortcut, ready.shortcut_token)
        assert connection is not None
        answers: asyncio.Queue[bytes] = asyncio.Queue()
        ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        shortcut = Shortcut(connection, on_message=answers.put_nowait, on_end=ended.set_result)
        order = stage_pb2.ControlRequest(micro_batch=micro_batch(1, {0: [7]}, starts=[start(0)]))
        shortcut.send(order.SerializeToString())
        async with asyncio.timeout(TIMEOUT_S):
            answer = stage_pb2.ControlResponse.FromString(await answers.get())
        assert list(answer.sampled.token_ids) == [7 + 0 + 1]
        assert list((await coordinator.controls[0].next("report")).batch_rows) == [1]
        shortcut.send(order.SerializeToString())  # its id does not ascend
        failure = await coordinator.controls[0].failure()
        assert failure.code() is PRECONDITION
        shortcut.close()
