"""Streams that bring many requests, each of which is answered in a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from core.errors import PenstockError

Request = TypeVar("Request")
Start = Callable[[asyncio.TaskGroup, Request], "asyncio.Task[None] | None"]


async def answer_beside_each_other(
    requests: AsyncIterator[Request], start: Start[Request], *, most: int
) -> None:
    """Has `start` begin a task for each request; returns when all are through.

    `most` tasks run at a time; further messages wait in HTTP/2's window. `start` returns None
    for a message that asks for none. A message that is no protobuf, or that `start` raises an
    error of ours for, ends the stream after the requests before it; raises that error.
    """
    places = asyncio.Semaphore(most)
    failure: PenstockError | None = None
    async with asyncio.TaskGroup() as tasks:
        try:
            async for request in requests:
                await places.acquire()
                task = start(tasks, request)
                if task is None:
                    places.release()
                else:
                    task.add_done_callback(lambda _: places.release())
        except PenstockError as error:
            failure = error
    if failure is not None:  # raised here, since the group would wrap it
        raise failure
