"""What stands for a call to a supervisor that starts processes and lasts as long as their trial."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any


class Trial:
    """As the stub's call: tells what has been started, then nothing more until it is ended."""

    def __init__(self, starting: Coroutine[Any, Any, Sequence[Any]]) -> None:
        """`starting` returns a message for each process."""
        self._starting = asyncio.create_task(starting)
        self._num_told = 0

    async def read(self) -> Any:
        started = await self._starting
        if self._num_told == len(started):
            await asyncio.Event().wait()
        self._num_told += 1
        return started[self._num_told - 1]

    def cancel(self) -> None:
        """Nothing is left to do: replicas that failed stay, and the round fails."""
