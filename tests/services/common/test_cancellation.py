"""Being cancelled around a task group that fails."""

from __future__ import annotations

import asyncio

import pytest

from services.common.cancellation import in_own_task


async def fail_while_the_group_ends() -> None:
    async def fail() -> None:
        raise OSError

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())


async def test_a_group_that_fails_while_it_ends_does_not_count_as_a_cancellation() -> None:
    for _ in range(3):
        with pytest.raises(ExceptionGroup):
            await in_own_task(fail_while_the_group_ends())
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


@pytest.mark.parametrize("fails", [True, False])
async def test_a_cancellation_that_the_work_swallows_is_raised_all_the_same(fails: bool) -> None:
    begun = asyncio.Event()

    async def swallow() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if fails:
                raise OSError from None

    task = asyncio.create_task(in_own_task(swallow()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
