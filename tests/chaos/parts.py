"""Processes of a mesh that may be killed, stopped and frozen; whoever dies is started again."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import replace

import psutil

from services.local.process import MeshProcess, ProcessCommand

# As the local mesh does, which starts a process again after a short pause; one that another one
# stands in for a little later.
RESTART_PAUSE_S = 0.2
STOP_GRACE_S = 10.0


class Part:
    """One process and those that take its place."""

    def __init__(self, process: MeshProcess, *, restart_pause_s: float = RESTART_PAUSE_S) -> None:
        self._process = process
        self._restart_pause_s = restart_pause_s
        self._keeper: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self._process.name

    @property
    def command(self) -> ProcessCommand:
        return self._process.command

    def usage(self) -> psutil.Process:
        """For questions about memory, threads and descriptors."""
        return psutil.Process(self._process.record().pid)

    async def start(self) -> None:
        """Starts it, and keeps it running until `stop`."""
        await self._process.start()
        self._keeper = asyncio.create_task(self._keep())

    def restart_with(self, arguments: tuple[str, ...]) -> None:
        """Whatever is started from now on has these."""
        self._process.command = replace(self.command, arguments=arguments)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process of now, if it lives."""
        if self._process.is_running:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self._process.record().pid, number)

    def terminate(self) -> None:
        """Ends it in order; it is started again, with the arguments of then."""
        self.signal(signal.SIGTERM)

    async def stop(self) -> int:
        """Ends it in order; returns its exit code, and kills it where it does not end."""
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        self.signal(signal.SIGCONT)
        await self._process.stop(grace_s=STOP_GRACE_S)
        return await self._process.wait()

    async def _keep(self) -> None:
        while True:
            await self._process.wait()
            await asyncio.sleep(self._restart_pause_s)
            await self._process.start()
