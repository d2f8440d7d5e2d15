"""Links to replicas of the next stage: dialled on order, and each broken for itself."""

from __future__ import annotations

from contextlib import AsyncExitStack

import grpc
import pytest
from penstock.v1 import stage_pb2

from tests.support.stages import (
    ControlStream,
    HandDrivenCoordinator,
    both_ways,
    micro_batch,
    running_chain,
    running_replicas,
    running_stage,
    start,
)

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@both_ways
async def test_a_stage_feeds_several_replicas(offers_shortcuts: bool) -> None:
    async with (
        running_replicas(0, 1, 1, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages, places=[0, 1, 1]) as coordinator,
    ):
        await coordinator.open()
        for id in range(1, 7):
            slot = id % 2
            batch = micro_batch(id, {slot: [10 * id]}, starts=[start(slot)] if id < 3 else [])
            await coordinator.run(batch, path=[0, 1 + slot])
        for slot in (0, 1):
            control = coordinator.controls[1 + slot]
            results = [await control.next("sampled") for _ in range(3)]
            ids = [id for id in range(1, 7) if id % 2 == slot]
            assert [result.micro_batch_id for result in results] == ids
            assert [list(result.token_ids) for result in results] == [[10 * id + 2] for id in ids]


async def test_what_leads_nowhere_is_answered_by_the_stage_itself() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        await coordinator.run(micro_batch(1, {0: [7, 8]}, starts=[start(0)]), path=[0])
        answer = await coordinator.controls[0].next("sampled")
    assert (answer.micro_batch_id, list(answer.token_ids)) == (1, [])
    assert stages[1].engine.steps == []


@both_ways
async def test_rows_are_sent_again_over_another_link(offers_shortcuts: bool) -> None:
    async with (
        running_replicas(0, 1, 1, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages, places=[0, 1, 1]) as coordinator,
    ):
        await coordinator.open()
        await coordinator.run(micro_batch(1, {0: [7, 8, 9]}, starts=[start(0)]), path=[0, 1])
        await coordinator.controls[1].next("sampled")
        again = micro_batch(2, {0: [0, 0, 0]})
        again.updates.CopyFrom(stage_pb2.SequenceUpdates())
        again.num_samples[:] = [3]
        await coordinator.controls[2].send(
            updates=stage_pb2.SequenceUpdates(starts=[start(0)], block_slots=[0], block_ids=[0])
        )
        await coordinator.run(again, path=[0, 2], replays=True)
        restored = await coordinator.controls[2].next("sampled")
        reports = [await coordinator.controls[0].report()]
        while reports[-1].performed_id != 2:
            reports.append(await coordinator.controls[0].report())
    assert list(restored.token_ids) == [7 + 0 + 2, 8 + 1 + 2, 9 + 2 + 2]
    # A replay says nothing about how long computing takes.
    assert [rows for report in reports for rows in report.batch_rows] == [3]


@both_ways
async def test_a_link_that_breaks_is_reported_and_the_session_goes_on(
    offers_shortcuts: bool,
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(
            running_stage(index=0, num_stages=2, offers_shortcuts=offers_shortcuts)
        )
        staying = await stack.enter_async_context(running_stage(index=1, num_stages=2))
        async with running_stage(index=1, num_stages=2) as leaving:
            coordinator = await stack.enter_async_context(
                HandDrivenCoordinator([first, staying, leaving], places=[0, 1, 1])
            )
            await coordinator.open()
            await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]), path=[0, 2])
            await coordinator.controls[2].next("sampled")
        control = coordinator.controls[0]
        state = await control.next("link")
        assert (state.link_id, state.stands) == (coordinator.links[0, 2], False)
        assert leaving.address in state.problem
        # What goes over the broken link is computed, and goes nowhere.
        order = micro_batch(2, {0: [8]}, first_position=1)
        order.downstream_link = coordinator.links[0, 2]
        await control.send(micro_batch=order)
        await coordinator.run(micro_batch(3, {1: [9]}, starts=[start(1)]), path=[0, 1])
        answer = await coordinator.controls[1].next("sampled")
        assert (answer.micro_batch_id, list(answer.token_ids)) == (3, [9 + 0 + 2])
        assert first.engine.steps == [1, 2, 3]


@both_ways
async def test_a_stage_that_is_held_for_a_link_goes_on_when_it_breaks(
    offers_shortcuts: bool,
) -> None:
    options = {"initial_credits": 1, "offers_shortcuts": offers_shortcuts}
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running_stage(index=0, num_stages=2, **options))
        staying = await stack.enter_async_context(running_stage(index=1, num_stages=2, **options))
        async with running_stage(index=1, num_stages=2, **options) as leaving:
            coordinator = await stack.enter_async_context(
                HandDrivenCoordinator([first, staying, leaving], places=[0, 1, 1])
            )
            await coordinator.open()
            leaving.engine.gate.clear()
            await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]), path=[0, 2])
            for id in range(2, 6):  # one has the credit, one waits for it, the others are held
                batch = micro_batch(id, {0: [7]}, first_position=id - 1)
                await coordinator.run(batch, path=[0, 2])
            await coordinator.run(micro_batch(6, {1: [9]}, starts=[start(1)]), path=[0, 1])
            for _ in range(5):
                assert (await coordinator.controls[0].report()).performed_id <= 2
        answer = await coordinator.controls[1].next("sampled")
    assert (answer.micro_batch_id, list(answer.token_ids)) == (6, [9 + 0 + 2])
    assert first.engine.steps == [1, 2, 3, 4, 5, 6]


async def test_an_address_where_nobody_listens_is_reported_at_once() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        async with running_stage(index=1, num_stages=2) as gone:
            pass
        state = await coordinator.connect(0, 1, address=gone.address)
        assert not state.stands
        assert gone.address in state.problem
        assert (await coordinator.connect(0, 1)).stands


async def test_a_replica_that_has_begun_anew_refuses_links_to_what_it_was() -> None:
    async with running_chain(2) as stages, ControlStream(stages[0].address) as control:
        await control.open(epoch=1, index=0, num_stages=2)
        async with ControlStream(stages[1].address) as last:
            await last.open(epoch=5, index=1, num_stages=2)
            await last.next("ready")
            await control.send(
                open_downstream=stage_pb2.OpenDownstream(
                    link_id=1, address=stages[1].address, epoch=4
                )
            )
            state = await control.next("link")
        assert not state.stands
        assert "epoch 4" in state.problem


async def test_a_link_to_a_replica_that_opens_later_stands_then() -> None:
    async with running_chain(2) as stages, ControlStream(stages[0].address) as control:
        await control.open(epoch=1, index=0, num_stages=2)
        order = stage_pb2.OpenDownstream(link_id=1, address=stages[1].address, epoch=3)
        await control.send(open_downstream=order)
        assert (await control.report()).performed_id == 0  # it goes on meanwhile
        async with ControlStream(stages[1].address) as last:
            await last.open(epoch=3, index=1, num_stages=2)
            assert (await control.next("link")).stands


@pytest.mark.parametrize("link_id", [0, 1])
async def test_an_id_that_cannot_be_or_has_been_used_ends_the_stream(link_id: int) -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        order = stage_pb2.OpenDownstream(link_id=link_id, address=stages[1].address, epoch=1)
        await coordinator.controls[0].send(open_downstream=order)
        code = PRECONDITION if link_id else grpc.StatusCode.INVALID_ARGUMENT
        assert (await coordinator.controls[0].failure()).code() is code


async def test_an_order_over_a_link_that_never_was_ends_the_stream() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        order = micro_batch(1, {0: [7]}, starts=[start(0)])
        order.downstream_link = 77
        await coordinator.controls[0].send(micro_batch=order)
        assert (await coordinator.controls[0].failure()).code() is PRECONDITION
