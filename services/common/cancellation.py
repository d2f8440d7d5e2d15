"""What asyncio leaves to its callers about being cancelled."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raises CancelledError in a task that has been cancelled.

    For loops that go on after a TaskGroup has failed: before Python 3.13 a group swallows a
    cancellation that comes while one of its children fails.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
