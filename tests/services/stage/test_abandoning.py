"""Micro-batches that are given up: passed over in their place, but for their updates."""

from __future__ import annotations

from penstock.v1 import stage_pb2

from tests.support.stages import (
    HandDrivenCoordinator,
    RunningStage,
    both_ways,
    micro_batch,
    running_chain,
    running_replicas,
    running_stage,
    start,
)


async def until_performed(coordinator: HandDrivenCoordinator, index: int, id: int) -> None:
    """Waits until a replica has come so far."""
    while (await coordinator.controls[index].report()).performed_id < id:
        pass


@both_ways
async def test_one_that_waits_at_the_head_of_the_line_lets_the_others_pass(
    offers_shortcuts: bool,
) -> None:
    async with (
        running_replicas(0, 0, 1, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages, places=[0, 0, 1]) as coordinator,
    ):
        await coordinator.open()
        stages[0].engine.gate.clear()
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]), path=[0, 2])
        await coordinator.run(micro_batch(2, {0: [8]}, first_position=1), path=[0, 2])
        await coordinator.run(micro_batch(3, {1: [9]}, starts=[start(1)]), path=[1, 2])
        await until_performed(coordinator, 1, 3)
        assert (await coordinator.controls[2].report()).performed_id == 0
        await coordinator.abandon(2, 1, 2)
        answer = await coordinator.sampled()
        assert (answer.micro_batch_id, list(answer.token_ids)) == (3, [9 + 0 + 2])
        assert stages[2].engine.steps == [3]
        assert stages[2].engine.live == {0, 1}  # its sequence has begun all the same
        assert (await coordinator.controls[2].report()).kv_blocks_used == 2


@both_ways
async def test_frames_that_come_of_them_are_dropped_and_their_credits_go_back(
    offers_shortcuts: bool,
) -> None:
    async with (
        running_replicas(0, 0, 1, initial_credits=4, offers_shortcuts=offers_shortcuts) as stages,
        HandDrivenCoordinator(stages, places=[0, 0, 1]) as coordinator,
    ):
        await coordinator.open()
        stages[1].engine.gate.clear()
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]), path=[1, 2])
        for id in range(2, 30):  # behind one that waits: some have come, some will
            starts = [start(1)] if id == 2 else []
            batch = micro_batch(id, {1: [id]}, first_position=id - 2, starts=starts)
            await coordinator.run(batch, path=[0, 2])
        await coordinator.abandon(2, *range(2, 30))
        await coordinator.controls[2].report()  # it has heard
        stages[1].engine.gate.set()
        assert (await coordinator.sampled()).micro_batch_id == 1
        await until_performed(coordinator, 0, 29)
        for id in range(30, 40):
            batch = micro_batch(id, {1: [id]}, first_position=id - 2)
            await coordinator.run(batch, path=[0, 2])
            assert (await coordinator.sampled()).micro_batch_id == id
        assert stages[2].engine.steps == [1, *range(30, 40)]


async def test_one_that_is_held_for_a_link_needs_no_room_any_more() -> None:
    options = {"initial_credits": 1}
    async with (
        running_chain(2, **options) as stages,
        running_stage(index=1, num_stages=2, **options) as free,
        HandDrivenCoordinator([*stages, free], places=[0, 1, 1]) as coordinator,
    ):
        await coordinator.open()
        stages[1].engine.gate.clear()
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]), path=[0, 1])
        for id in (2, 3, 4):
            await coordinator.run(micro_batch(id, {0: [7]}, first_position=id - 1), path=[0, 1])
        await coordinator.run(micro_batch(5, {1: [9]}, starts=[start(1)]), path=[0, 2])
        await until_performed(coordinator, 0, 2)
        await coordinator.abandon(0, 3, 4)
        assert (await coordinator.controls[2].next("sampled")).micro_batch_id == 5
        assert stages[0].engine.steps == [1, 2, 5]


async def test_one_that_is_being_computed_is_computed_to_its_end() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        (control,) = coordinator.controls
        await begin_computing(coordinator, stages[0])
        await coordinator.abandon(0, 1, 2)
        await control.report()  # it has heard
        stages[0].engine.gate.set()
        assert (await coordinator.sampled()).micro_batch_id == 1
        await until_performed(coordinator, 0, 2)
        assert stages[0].engine.steps == [1]


async def begin_computing(coordinator: HandDrivenCoordinator, stage: RunningStage) -> None:
    """Has a single stage begin its first micro-batch, with a second one behind it."""
    stage.engine.gate.clear()
    await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
    await coordinator.run(micro_batch(2, {0: [8]}, first_position=1))
    while not (await coordinator.controls[0].report()).computing.ToNanoseconds():
        pass


async def test_those_that_are_done_or_unknown_are_ignored() -> None:
    async with running_chain(2) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        await coordinator.run(micro_batch(1, {0: [7]}, starts=[start(0)]))
        await coordinator.sampled()
        for index in (0, 1):
            await coordinator.abandon(index, 1, 2, 77)
        await coordinator.run(micro_batch(2, {0: [8]}, first_position=1))
        assert list((await coordinator.sampled()).token_ids) == [8 + 1 + 2]


async def test_rewinds_reach_the_engine_with_their_order() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        await coordinator.run(micro_batch(1, {0: [7, 8, 9]}, starts=[start(0)]))
        batch = micro_batch(2, {0: [8]}, first_position=1)
        batch.updates.rewind_slots.append(0)
        batch.updates.rewind_positions.append(1)
        await coordinator.run(batch)
        for _ in range(2):
            await coordinator.sampled()
        await coordinator.controls[0].send(
            updates=stage_pb2.SequenceUpdates(rewind_slots=[0], rewind_positions=[0])
        )
        await coordinator.run(micro_batch(3, {0: [8]}))
        await coordinator.sampled()
        assert stages[0].engine.rewound == [(0, 1), (0, 0)]


async def test_a_stage_that_computes_answers_at_once_how_long_it_has() -> None:
    async with running_chain(1) as stages, HandDrivenCoordinator(stages) as coordinator:
        await coordinator.open()
        (control,) = coordinator.controls
        assert (await control.report()).computing.ToNanoseconds() == 0
        await begin_computing(coordinator, stages[0])
        first, second = await control.report(), await control.report()
        assert 0 < first.computing.ToNanoseconds() < second.computing.ToNanoseconds()
        assert first.performed_id == second.performed_id == 0
        stages[0].engine.gate.set()
        for _ in range(2):
            await coordinator.sampled()
        await until_performed(coordinator, 0, 2)
        assert (await control.report()).computing.ToNanoseconds() == 0
