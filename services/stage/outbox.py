"""Messages on their way out of a stream's handler."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Outbox(Generic[Message]):
    """Messages that others put in and one handler iterates over, until it is closed.

    It has no bound of its own: its messages are answers, at most a few for each order
    or frame taken in, and those are bounded. Belongs to the event loop's thread.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._wakened = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, message: Message) -> None:
        """Adds a message; does nothing once closed."""
        if not self._closed:
            self._messages.append(message)
            self._wakened.set()

    def close(self, error: Exception | None = None) -> None:
        """Ends the iteration after the messages that are there, with `error` if given.

        Only the first call counts.
        """
        if not self._closed:
            self._closed = True
            self._error = error
            self._wakened.set()

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            while self._messages:
                yield self._messages.popleft()
            if self._closed:
                break
            self._wakened.clear()
            await self._wakened.wait()
        if self._error is not None:
            raise self._error
