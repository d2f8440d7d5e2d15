"""Streams of activations into a stage: several at a time, each refused and ended for itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from penstock.v1 import stage_pb2, stage_pb2_grpc, tensor_pb2

from core.wire.frames import encode_frames
from services.common.channels import open_channel
from tests.support.counting_engine import HIDDEN_SIZE
from tests.support.stages import (
    TIMEOUT_S,
    ControlStream,
    HandDrivenCoordinator,
    both_ways,
    micro_batch,
    running_replicas,
    running_stage,
    start,
)

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


@both_ways
async def test_a_stage_hears_from_several_replicas_in_the_order_of_the_schedule(
    offers_shortcuts: bool,
) -> None:
    async with (
        running_replicas(0, 0, 1, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages, places=[0, 0, 1]) as coordinator,
    ):
        await coordinator.open()
        stages[0].engine.gate.clear()  # the other one is done long before
        for id in range(1, 9):
            slot = id % 2
            batch = micro_batch(id, {slot: [10 * id]}, starts=[start(slot)] if id < 3 else [])
            batch.first_positions[:] = [(id - 1) // 2]
            await coordinator.run(batch, path=[1 - slot, 2])
        while stages[1].engine.steps != [2, 4, 6, 8]:
            await coordinator.controls[1].report()
        stages[0].engine.gate.set()
        results = [await coordinator.sampled() for _ in range(8)]
    assert [result.micro_batch_id for result in results] == list(range(1, 9))
    assert [list(result.token_ids) for result in results] == [
        [10 * id + (id - 1) // 2 + 2] for id in range(1, 9)
    ]
    assert stages[0].engine.steps == [1, 3, 5, 7]


def opened(epoch: int = 1, link_id: int = 9) -> stage_pb2.ActivateRequest:
    return stage_pb2.ActivateRequest(open=stage_pb2.OpenLink(epoch=epoch, link_id=link_id))


def frame(**fields: Any) -> stage_pb2.ActivateRequest:
    hidden_TH = np.zeros((2, HIDDEN_SIZE), np.float32)
    (request,) = encode_frames(
        hidden_TH, link_id=9, micro_batch_id=1, first_sequence_number=0, codec="f32"
    )
    for name, value in fields.items():
        setattr(request.frame, name, value)
    return request


async def activate(
    address: str, messages: Sequence[stage_pb2.ActivateRequest]
) -> tuple[int, grpc.StatusCode]:
    """Plays an upstream replica; returns its credits and the status that the stream ended with."""
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


@asynccontextmanager
async def open_link(address: str, *, link_id: int) -> AsyncIterator[Any]:
    """An upstream replica's stream that has its first credits."""
    async with open_channel(address) as channel:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        call = stub.Activate(timeout=TIMEOUT_S)
        await call.write(opened(link_id=link_id))
        assert (await call.read()).credits == 64
        yield call
        call.cancel()


@asynccontextmanager
async def last_of_two() -> AsyncIterator[tuple[str, ControlStream]]:
    """The second of two stages, opened; a test plays the first."""
    async with running_stage(index=1, num_stages=2) as stage, ControlStream(stage.address) as last:
        await last.open(epoch=1, index=1, num_stages=2)
        await last.next("ready")
        yield stage.address, last


async def run_over(
    call: Any, control: ControlStream, *, link_id: int, id: int, starts: bool
) -> list[int]:
    """Sends an order of two rows and their frame; returns the tokens."""
    batch = micro_batch(id, {link_id: [0, 0]}, starts=[start(link_id)] if starts else [])
    batch.ClearField("token_ids")
    batch.upstream_link = link_id
    await control.send(micro_batch=batch)
    await call.write(frame(link_id=link_id, micro_batch_id=id))
    return list((await control.next("sampled")).token_ids)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([frame()], INVALID),
        ([stage_pb2.ActivateRequest()], INVALID),
        ([opened(), opened()], INVALID),
        ([opened(link_id=0)], INVALID),
        ([opened(), frame(hidden_size=5)], INVALID),
        ([opened(), frame(data=b"x")], INVALID),
        ([opened(), frame(codec=tensor_pb2.CODEC_BF16)], INVALID),
        ([opened(), frame(checksum=1)], grpc.StatusCode.DATA_LOSS),
        ([opened(), frame(link_id=8)], PRECONDITION),
        ([opened(), frame(), frame()], PRECONDITION),
        (
            [opened(), *(frame(sequence_number=id, micro_batch_id=id) for id in range(65))],
            PRECONDITION,
        ),
        ([opened(epoch=0)], PRECONDITION),
    ],
)
async def test_a_frame_that_does_not_fit_ends_its_link_and_no_other(
    messages: list[stage_pb2.ActivateRequest], code: grpc.StatusCode
) -> None:
    async with last_of_two() as (address, last), open_link(address, link_id=7) as call:
        assert await run_over(call, last, link_id=7, id=1, starts=True) == [1]
        _, seen = await activate(address, messages)
        assert seen is code
        batch = micro_batch(2, {7: [0, 0]}, first_position=2)
        batch.ClearField("token_ids")
        batch.upstream_link = 7
        await last.send(micro_batch=batch)
        await call.write(frame(link_id=7, micro_batch_id=2, sequence_number=1))
        assert (await last.next("sampled")).micro_batch_id == 2


async def test_more_rows_than_are_ordered_end_the_link_that_brought_them() -> None:
    async with last_of_two() as (address, last), open_link(address, link_id=9) as call:
        await call.write(frame())
        batch = micro_batch(1, {0: [0]}, starts=[start(0)])
        batch.ClearField("token_ids")
        batch.upstream_link = 9
        await last.send(micro_batch=batch)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is PRECONDITION
        assert (await last.report()).performed_id == 0


async def test_a_link_id_serves_once() -> None:
    async with last_of_two() as (address, last):
        async with open_link(address, link_id=9) as call:
            assert await activate(address, [opened()]) == (0, PRECONDITION)
            assert await run_over(call, last, link_id=9, id=1, starts=True) == [1]
        assert await activate(address, [opened()]) == (0, PRECONDITION)
        async with open_link(address, link_id=10) as call:
            assert await run_over(call, last, link_id=10, id=2, starts=True) == [1]


async def test_an_order_over_a_link_that_never_was_ends_the_stream() -> None:
    async with last_of_two() as (_, last):
        batch = micro_batch(1, {0: [0]}, starts=[start(0)])
        batch.ClearField("token_ids")
        batch.upstream_link = 5
        await last.send(micro_batch=batch)
        assert (await last.failure()).code() is PRECONDITION


async def test_an_order_over_a_link_that_is_gone_waits_to_be_abandoned() -> None:
    async with last_of_two() as (address, last):
        async with open_link(address, link_id=9) as call:
            assert await run_over(call, last, link_id=9, id=1, starts=True) == [1]
        batch = micro_batch(2, {9: [0]}, first_position=2)
        batch.ClearField("token_ids")
        batch.upstream_link = 9
        await last.send(micro_batch=batch)
        assert (await last.report()).performed_id == 1
        await last.send(abandon=stage_pb2.AbandonMicroBatches(ids=[2]))
        while (await last.report()).performed_id != 2:
            pass
