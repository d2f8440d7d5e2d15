"""Stages behind real servers: orders in, activations across, tokens out, and every refusal."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from penstock.v1 import stage_pb2

from core.errors import Unavailable
from services.stage.stage import MAX_EPOCH_AHEAD_MS
from tests.support.counting_engine import CONTEXT_LENGTH, POISON
from tests.support.stages import (
    TIMEOUT_S,
    ControlStream,
    HandDrivenCoordinator,
    RunningStage,
    micro_batch,
    running_chain,
    running_stage,
    start,
)

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


async def runs_a_micro_batch(stages: list[RunningStage], *, epoch: int) -> None:
    """Asserts that the chain works, from OpenPipeline to a token."""
    async with HandDrivenCoordinator(stages, epoch=epoch) as coordinator:
        await coordinator.open()
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
        sampled = await coordinator.sampled()
        assert list(sampled.token_ids) == [7 + 0 + len(stages)]


async def test_updates_alone_are_applied_and_blocks_counted() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        control = coordinator.controls[0]
        await coordinator.run(micro_batch(1, {4: [1]}, starts=[start(4)]))
        await coordinator.sampled()
        await control.send(report=stage_pb2.ReportRequest())
        report = await control.next("report")
        assert report.kv_blocks_used == 1
        await control.send(updates=stage_pb2.SequenceUpdates(ended_slots=[4]))
        await coordinator.run(micro_batch(2, {5: [1]}, starts=[start(5), start(6)]))
        await coordinator.sampled()
        await control.send(report=stage_pb2.ReportRequest())
        assert (await control.next("report")).kv_blocks_used == 2
        assert stages[0].engine.live == {5, 6}


async def test_reports_come_by_themselves_and_attribute_the_time() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        stages[0].engine.gate.clear()
        await coordinator.run(micro_batch(1, {0: [1, 2, 3]}, starts=[start(0)]))
        # Once the second stage answers, it has its order, and starves until the first computes.
        await coordinator.controls[1].send(report=stage_pb2.ReportRequest())
        await coordinator.controls[1].next("report")
        stages[0].engine.gate.set()
        reports = [await control.next("report") for control in coordinator.controls]
    for report in reports:
        assert list(report.batch_rows) == [3]
        assert len(report.batch_compute_us) == 1
        assert 0 < report.busy.ToNanoseconds() <= report.interval.ToNanoseconds()
        assert report.serialise.ToNanoseconds() > 0
    assert reports[0].wire.ToNanoseconds() > 0
    assert reports[0].starved.ToNanoseconds() == 0
    assert reports[1].starved.ToNanoseconds() > 0


async def test_a_compute_thread_that_hangs_ends_the_process() -> None:
    async with running_stage(index=0, num_stages=1, hang_limit_s=0.1) as stage:
        async with HandDrivenCoordinator([stage]) as coordinator:
            await coordinator.open()
            stage.engine.gate.clear()
            await coordinator.run(micro_batch(1, {0: [1]}, starts=[start(0)]))
            async with ControlStream(stage.address) as control:
                await control.open(epoch=2, index=0, num_stages=1)
                assert "has hung" in str((await control.failure()).details())
        with pytest.raises(Unavailable, match="has hung"):
            await asyncio.wait_for(stage.stage.watch(), TIMEOUT_S)


async def test_the_coordinator_of_the_latest_term_has_the_stage_for_good() -> None:
    async with (
        running_stage(index=0, num_stages=1) as stage,
        ControlStream(stage.address) as old,
        ControlStream(stage.address) as new,
        ControlStream(stage.address) as old_again,
    ):
        await old.open(epoch=10, index=0, num_stages=1, term=1)
        await old.next("ready")
        await new.open(epoch=5 + 10, index=0, num_stages=1, term=2)
        await new.next("ready")
        assert (await old.failure()).code() is grpc.StatusCode.ABORTED
        await old_again.open(epoch=20, index=0, num_stages=1, term=1)
        assert (await old_again.failure()).code() is grpc.StatusCode.ABORTED
        await new.report()


async def test_the_model_may_load_after_the_coordinator_has_called() -> None:
    async with (
        running_stage(index=0, num_stages=1, loaded=False) as stage,
        ControlStream(stage.address) as control,
    ):
        await control.open(epoch=1, index=0, num_stages=1)
        assert not stage.health.is_serving("")
        await stage.load()
        assert (await control.next("ready")).model == "fake"
        assert stage.health.is_serving("")
        assert stage.health.is_serving("fake/stage/0")


async def test_a_new_stream_takes_over_and_starts_from_nothing() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages, epoch=1) as old:
        await old.open()
        await old.run(micro_batch(1, {0: [1], 1: [2]}, starts=[start(0), start(1)]))
        await old.sampled()
        await runs_a_micro_batch(stages, epoch=2)
        for control in old.controls:
            failure = await control.failure()
            assert failure.code() is grpc.StatusCode.UNAVAILABLE


async def test_orders_in_flight_die_with_their_stream() -> None:
    async with running_chain(2) as stages:
        async with HandDrivenCoordinator(stages, epoch=1) as old:
            await old.open()
            stages[0].engine.gate.clear()
            await old.run(micro_batch(1, {0: [1]}, starts=[start(0)]))
            await old.run(micro_batch(2, {0: [2]}, first_position=1))
        async with HandDrivenCoordinator(stages, epoch=2) as new:
            opening = asyncio.create_task(new.open())
            for running in stages:
                await running.stage.session_of(2)  # the old stream has ended here
            stages[0].engine.gate.set()
            await opening
            await new.run(micro_batch(1, {0: [50]}, starts=[start(0)]))
            assert list((await new.sampled()).token_ids) == [52]
            assert stages[1].engine.steps == [1]


async def test_sequences_are_dropped_when_the_stream_ends() -> None:
    async with running_chain(1) as stages:
        for epoch in (1, 2, 3):  # the same slot starts anew each time
            await runs_a_micro_batch(stages, epoch=epoch)


async def test_a_sequence_whose_end_was_refused_does_not_stay_behind() -> None:
    async with running_chain(1) as stages:
        async with HandDrivenCoordinator(stages) as coordinator:
            await coordinator.open()
            await coordinator.run(micro_batch(1, {0: [1]}, starts=[start(0)]))
            control = coordinator.controls[0]
            await control.send(updates=stage_pb2.SequenceUpdates(ended_slots=[0, 0]))
            assert (await control.failure()).code() is PRECONDITION
        await runs_a_micro_batch(stages, epoch=2)


async def test_an_epoch_that_is_not_newer_is_refused_and_the_session_goes_on() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages, epoch=5) as coordinator:
        await coordinator.open()
        for epoch in (4, 5):
            async with ControlStream(stages[0].address) as control:
                await control.open(epoch=epoch, index=0, num_stages=1)
                assert (await control.failure()).code() is PRECONDITION
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
        assert list((await coordinator.sampled()).token_ids) == [8]


async def test_an_epoch_far_in_the_future_is_refused_and_keeps_nobody_out() -> None:
    now_ms = time.time_ns() // 1_000_000
    async with running_chain(1) as stages:
        for epoch in (2**64 - 1, now_ms + 2 * MAX_EPOCH_AHEAD_MS):
            async with ControlStream(stages[0].address) as control:
                await control.open(epoch=epoch, index=0, num_stages=1)
                assert (await control.failure()).code() is PRECONDITION
        await runs_a_micro_batch(stages, epoch=now_ms)


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ({"index": 1, "num_stages": 2}, PRECONDITION),
        ({"index": 0, "num_stages": 2}, PRECONDITION),
        ({"index": 3, "num_stages": 1}, INVALID),
    ],
)
async def test_a_place_that_does_not_fit_the_layers_is_refused(
    place: dict[str, Any], code: grpc.StatusCode
) -> None:
    async with running_chain(1) as stages:
        async with ControlStream(stages[0].address) as control:
            await control.open(epoch=1, **place)
            assert (await control.failure()).code() is code
        await runs_a_micro_batch(stages, epoch=2)


def changed(**fields: Any) -> dict[str, Message]:
    batch = micro_batch(1, {0: [7, 8]}, starts=[start(0)])
    for name, value in fields.items():
        batch.ClearField(name)
        getattr(batch, name).extend(value)
    return {"micro_batch": batch}


def linked(**links: int) -> dict[str, Message]:
    order = changed()["micro_batch"]
    for name, link_id in links.items():
        setattr(order, name, link_id)
    return {"micro_batch": order}


def started(**fields: Any) -> dict[str, Message]:
    begin = start(0)
    begin.MergeFrom(stage_pb2.SequenceStart(**fields))
    return {"updates": stage_pb2.SequenceUpdates(starts=[begin])}


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ({}, INVALID),
        ({"open": stage_pb2.OpenPipeline(epoch=9, num_stages=1)}, PRECONDITION),
        (changed(slots=[0, 1]), INVALID),
        (changed(slots=[]), INVALID),
        (changed(slots=[2**32 - 1]), INVALID),
        (changed(slots=[3]), PRECONDITION),
        (changed(num_rows=[0]), INVALID),
        (changed(num_rows=[3]), INVALID),
        (changed(num_samples=[3]), INVALID),
        (changed(num_rows=[2**31 - 1]), INVALID),
        (changed(token_ids=[7]), INVALID),
        (changed(token_ids=[7, 1000]), INVALID),
        (changed(token_ids=[]), INVALID),
        (started(sampling={"temperature": float("nan")}), INVALID),
        (started(sampling={"temperature": -1}), INVALID),
        (started(known_token_ids=[1000]), INVALID),
        (started(num_prompt_tokens=1), INVALID),
        (started(known_token_ids=[1] * (CONTEXT_LENGTH + 1)), INVALID),
        (linked(upstream_link=1), INVALID),
        (linked(downstream_link=1), INVALID),
        (linked(replays=True, upstream_link=1), INVALID),
        ({"open_downstream": stage_pb2.OpenDownstream(link_id=1)}, PRECONDITION),
        ({"updates": stage_pb2.SequenceUpdates(rewind_slots=[1])}, INVALID),
        ({"updates": stage_pb2.SequenceUpdates(block_slots=[1])}, INVALID),
        ({"updates": stage_pb2.SequenceUpdates(ended_slots=[1])}, PRECONDITION),
    ],
)
async def test_an_order_that_does_not_fit_ends_the_stream_and_the_stage_goes_on(
    order: dict[str, Any], code: grpc.StatusCode
) -> None:
    async with running_chain(1) as stages:
        async with HandDrivenCoordinator(stages) as coordinator:
            await coordinator.open()
            await coordinator.controls[0].send(**order)
            assert (await coordinator.controls[0].failure()).code() is code
        await runs_a_micro_batch(stages, epoch=10)


async def test_ids_of_micro_batches_must_ascend() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        await coordinator.run(micro_batch(4, {0: [7]}, starts=[start(0)]))
        await coordinator.run(micro_batch(4, {0: [7]}, first_position=1))
        assert (await coordinator.controls[0].failure()).code() is PRECONDITION


async def test_a_stream_that_opens_nothing_is_refused() -> None:
    async with running_chain(1) as stages:
        async with ControlStream(stages[0].address) as control:
            await control.send(report=stage_pb2.ReportRequest())
            assert (await control.failure()).code() is INVALID
        async with ControlStream(stages[0].address) as control:
            await control.call.done_writing()
            assert (await control.failure()).code() is INVALID
        await runs_a_micro_batch(stages, epoch=1)


async def test_a_failing_engine_ends_the_stream_with_an_id_and_the_stage_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_chain(1) as stages:
        async with HandDrivenCoordinator(stages) as coordinator:
            await coordinator.open()
            await coordinator.run(micro_batch(1, {0: [POISON]}, starts=[start(0)]))
            failure = await coordinator.controls[0].failure()
        assert failure.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (failure.details() or "")
        assert any("secret" in str(record.exc_info) for record in caplog.records)
        await runs_a_micro_batch(stages, epoch=2)
