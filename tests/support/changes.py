"""Waiting until something is so, in one event loop and without polling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """Whoever changes something tells; whoever waits looks again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            await self._event.wait()
