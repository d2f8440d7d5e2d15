"""Tokenises beside the event loop, within a time limit.

A tokenizer.json brings regular expressions of its own. Some take minutes for a text of a few
thousand characters, and nothing can interrupt the library that matches them: a thread that is lost
to one stays lost, and burns a core. So there are few threads, and a process whose threads are all
lost ends, for another one to take its place.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from core.errors import InvalidInput

_LOG = logging.getLogger(__name__)
NUM_THREADS = 3
# Texts that fill a context take milliseconds. Conversations may wait for the chat template, five
# seconds for each that is before them.
LIMIT_S = 20.0


class EncodingThreads:
    """At most so many texts are tokenised at a time; those of further requests wait."""

    def __init__(self, *, num_threads: int = NUM_THREADS, limit_s: float = LIMIT_S) -> None:
        self._num_threads = num_threads
        self._limit_s = limit_s
        self._places = asyncio.Semaphore(num_threads)
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._num_hung = 0
        self._all_hang = asyncio.Event()
        # Not of concurrent.futures, whose threads a process waits for at its end.
        for number in range(num_threads):
            threading.Thread(
                target=_serve, args=(self._inbox,), name=f"encoding-{number}", daemon=True
            ).start()

    async def run(self, field: str, work: Callable[[], list[int]]) -> list[int]:
        """What `work` returns or raises; raises InvalidInput, naming the request's `field`, where
        that takes too long."""
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[int]] = loop.create_future()
        overdue = loop.call_later(self._limit_s, self._give_up, result, field)
        settle = partial(self._settle, result, overdue)
        self._inbox.put(partial(_perform, work, partial(loop.call_soon_threadsafe, settle)))
        # Not cancelled with the request, whose thread would still run.
        return await asyncio.shield(result)

    def close(self) -> None:
        """Ends the threads that have nothing to do, and the others when they have."""
        for _ in range(self._num_threads):
            self._inbox.put(None)

    async def wait_until_all_hang(self) -> None:
        """Returns once no thread is left that could tokenise anything."""
        await self._all_hang.wait()

    def _give_up(self, result: asyncio.Future[list[int]], field: str) -> None:
        self._num_hung += 1
        _LOG.error("a text cannot be tokenised", extra={"hung_threads": self._num_hung})
        if self._num_hung == self._num_threads:
            self._all_hang.set()
        allowed = f"a text that the model's tokenizer takes less than {self._limit_s:g} s for"
        _fail(result, InvalidInput(field, "too hard to tokenise", allowed))

    def _settle(
        self,
        result: asyncio.Future[list[int]],
        overdue: asyncio.TimerHandle,
        token_ids: list[int] | None,
        error: BaseException | None,
    ) -> None:
        """Takes what a thread has come to, however late."""
        self._places.release()
        overdue.cancel()
        if result.done():
            self._num_hung -= 1
        elif error is not None:
            _fail(result, error)
        else:
            result.set_result(token_ids or [])


def _serve(inbox: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := inbox.get()) is not None:
        job()


def _perform(work: Callable[[], list[int]], post: Callable[..., object]) -> None:
    token_ids, error = None, None
    try:
        token_ids = work()
    except BaseException as raised:  # for whoever waits
        error = raised
    try:
        post(token_ids, error)
    except RuntimeError:  # the loop is closed: the process ends, nobody waits
        return


def _fail(result: asyncio.Future[list[int]], error: BaseException) -> None:
    result.set_exception(error)
    result.exception()  # its request may have gone, and nobody ask
