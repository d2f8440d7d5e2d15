"""What asyncio leaves to its callers about being cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def in_own_task(work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work`, which may hold a TaskGroup; raises CancelledError if cancelled meanwhile.

    For loops that go on after a group has failed. Before Python 3.13 a group swallows a
    cancellation that comes while one of its children fails, and counts one in `cancelling()`
    that nobody asked for when a child fails while the group ends. In a task of its own, neither
    reaches the caller.
    """
    caller = asyncio.current_task()
    assert caller is not None, "coroutines run in tasks"
    num_before = caller.cancelling()
    try:
        return await asyncio.create_task(work)
    finally:
        if caller.cancelling() > num_before:
            raise asyncio.CancelledError
