"""Stages behind real servers: orders in, activations across, tokens out, and every refusal."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from penstock.v1 import stage_pb2, stage_pb2_grpc, tensor_pb2

from core.wire.frames import encode_frames
from services.common.channels import open_channel
from services.common.statuses import error_from_rpc
from tests.support.counting_engine import HIDDEN_SIZE, POISON
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


async def test_an_epoch_that_is_not_newer_is_refused_and_the_session_goes_on() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages, epoch=5) as coordinator:
        await coordinator.open()
        for epoch in (4, 5):
            async with ControlStream(stages[0].address) as control:
                await control.open(epoch=epoch, index=0, num_stages=1)
                assert (await control.failure()).code() is PRECONDITION
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
        assert list((await coordinator.sampled()).token_ids) == [8]


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ({"index": 1, "num_stages": 2}, PRECONDITION),
        ({"index": 0, "num_stages": 2, "downstream": "127.0.0.1:1"}, PRECONDITION),
        ({"index": 3, "num_stages": 1}, INVALID),
        ({"index": 0, "num_stages": 1, "downstream": "127.0.0.1:1"}, INVALID),
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


async def activate(
    address: str, messages: list[stage_pb2.ActivateRequest]
) -> tuple[int, grpc.StatusCode]:
    """Plays an upstream stage; returns the credits it got and the status the stream ended with."""
    async with open_channel(address) as channel:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        call = stub.Activate(wait_for_ready=True, timeout=TIMEOUT_S)
        credits = 0
        # A write fails once the stream has ended; only the stream knows how it ended.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for message in messages:
                await call.write(message)
            while (response := await call.read()) is not grpc.aio.EOF:
                credits += response.credits
        return credits, await call.code()


def opened(epoch: int = 1) -> stage_pb2.ActivateRequest:
    return stage_pb2.ActivateRequest(open=stage_pb2.OpenLink(epoch=epoch))


def frame(**fields: Any) -> stage_pb2.ActivateRequest:
    hidden_TH = np.zeros((2, HIDDEN_SIZE), np.float32)
    (request,) = encode_frames(
        hidden_TH, epoch=1, micro_batch_id=1, first_sequence_number=0, codec="f32"
    )
    for name, value in fields.items():
        setattr(request.frame, name, value)
    return request


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([frame()], INVALID),
        ([stage_pb2.ActivateRequest()], INVALID),
        ([opened(), opened()], INVALID),
        ([opened(), frame(hidden_size=5)], INVALID),
        ([opened(), frame(data=b"x")], INVALID),
        ([opened(), frame(codec=tensor_pb2.CODEC_BF16)], INVALID),
        ([opened(), frame(checksum=1)], grpc.StatusCode.DATA_LOSS),
        ([opened(), frame(epoch=2)], PRECONDITION),
        ([opened(), frame(), frame()], PRECONDITION),
        (
            [opened(), *(frame(sequence_number=id, micro_batch_id=id) for id in range(65))],
            PRECONDITION,
        ),
        ([opened(0)], PRECONDITION),
    ],
)
async def test_a_frame_that_does_not_fit_ends_the_link_and_the_stage_goes_on(
    messages: list[stage_pb2.ActivateRequest], code: grpc.StatusCode
) -> None:
    async with running_chain(2) as stages:
        async with ControlStream(stages[1].address) as control:
            await control.open(epoch=1, index=1, num_stages=2)
            await control.next("ready")
            _, seen = await activate(stages[1].address, messages)
            assert seen is code
        await runs_a_micro_batch(stages, epoch=2)


async def test_a_second_link_in_an_epoch_is_refused_and_the_first_goes_on() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        assert await activate(stages[1].address, [opened()]) == (0, PRECONDITION)
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
        assert list((await coordinator.sampled()).token_ids) == [9]


async def test_frames_of_an_older_epoch_are_dropped() -> None:
    async with running_chain(2) as stages, ControlStream(stages[1].address) as control:
        await control.open(epoch=4, index=1, num_stages=2)
        await control.next("ready")
        async with open_channel(stages[1].address) as channel:
            stub: Any = stage_pb2_grpc.StageServiceStub(channel)
            call = stub.Activate(timeout=TIMEOUT_S)
            await call.write(opened(4))
            assert (await call.read()).credits == 64
            await call.write(frame(epoch=3))
            await call.write(frame(epoch=4))
            batch = micro_batch(1, {0: [7, 8]}, starts=[start(0)])
            batch.ClearField("token_ids")
            await control.send(micro_batch=batch)
            assert list((await control.next("sampled")).token_ids) == [1]
            call.cancel()


async def test_a_stage_says_so_when_the_next_one_goes() -> None:
    async with running_stage(index=0, num_stages=2) as first:
        async with running_stage(index=1, num_stages=2) as second:
            coordinator = HandDrivenCoordinator([first, second])
            await coordinator.__aenter__()
            await coordinator.open()
        failure = await coordinator.controls[0].failure()
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert second.address in str(error_from_rpc(failure))
        await coordinator.__aexit__(None, None, None)
