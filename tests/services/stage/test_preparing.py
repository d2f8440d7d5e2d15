"""A stage that waits for activations does meanwhile what needs none."""

from __future__ import annotations

import grpc

from tests.support.stages import (
    HandDrivenCoordinator,
    RunningStage,
    micro_batch,
    running_chain,
    start,
)


async def until_prepared(coordinator: HandDrivenCoordinator, stage: RunningStage, id: int) -> None:
    """Waits until the last stage has prepared a micro-batch."""
    while id not in stage.engine.prepared:
        await coordinator.controls[-1].report()


async def test_a_micro_batch_is_prepared_while_another_stage_computes_it() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        for id in (1, 2):
            stages[0].engine.gate.clear()
            starts = [start(0)] if id == 1 else []
            await coordinator.run(micro_batch(id, {0: [7]}, first_position=id - 1, starts=starts))
            await until_prepared(coordinator, stages[1], id)
            assert id not in stages[1].engine.steps
            assert stages[1].engine.live == {0}
            stages[0].engine.gate.set()
            assert list((await coordinator.sampled()).token_ids) == [7 + id - 1 + 2]
        assert stages[1].engine.prepared == stages[1].engine.steps == [1, 2]


async def test_one_that_is_prepared_and_abandoned_has_changed_the_sequences_once() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        stages[0].engine.gate.clear()
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
        await until_prepared(coordinator, stages[1], 1)
        for index in (0, 1):
            await coordinator.abandon(index, 1)
        while (await coordinator.controls[1].report()).performed_id < 1:  # passed over
            pass
        stages[0].engine.gate.set()
        batch = micro_batch(2, {0: [8]})
        batch.updates.ended_slots.append(0)  # refused of a sequence that is not live
        batch.updates.starts.append(start(0))
        await coordinator.run(batch)
        assert list((await coordinator.sampled()).token_ids) == [8 + 0 + 2]
        assert stages[1].engine.steps == [2]


async def test_one_that_cannot_be_prepared_ends_the_stream_and_the_stage_goes_on() -> None:
    async with running_chain(2) as stages:
        async with HandDrivenCoordinator(stages, epoch=1) as coordinator:
            await coordinator.open()
            stages[0].engine.gate.clear()
            batch = micro_batch(1, {0: [7]}, starts=[start(0)])
            batch.updates.ended_slots.append(5)
            await coordinator.run(batch)
            failure = await coordinator.controls[1].failure()
            assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert stages[1].engine.steps == []
            stages[0].engine.gate.set()
        async with HandDrivenCoordinator(stages, epoch=2) as coordinator:
            await coordinator.open()
            await coordinator.run(micro_batch(1, {0: [50]}, starts=[start(0)]))
            assert list((await coordinator.sampled()).token_ids) == [52]


async def test_what_was_prepared_is_forgotten_with_its_stream() -> None:
    async with running_chain(2) as stages:
        async with HandDrivenCoordinator(stages, epoch=1) as coordinator:
            await coordinator.open()
            stages[0].engine.gate.clear()
            await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
            await until_prepared(coordinator, stages[1], 1)
        stages[0].engine.gate.set()
        async with HandDrivenCoordinator(stages, epoch=2) as coordinator:
            await coordinator.open()
            assert stages[1].engine.live == set()
            await coordinator.run(micro_batch(1, {0: [50]}, starts=[start(0)]))
            assert list((await coordinator.sampled()).token_ids) == [52]
