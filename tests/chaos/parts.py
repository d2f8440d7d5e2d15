"""Processes of a mesh that may be killed, stopped and frozen; whoever dies is started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.local.child import ONE_THREAD

ROOT = Path(__file__).parents[2]
# As the local mesh does, which starts a process again after a short pause; one that another one
# stands in for a little later.
RESTART_PAUSE_S = 0.2
STOP_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class PartCommand:
    """What runs, and where it listens."""

    name: str
    module: str
    arguments: tuple[str, ...]
    address: str
    restart_pause_s: float = RESTART_PAUSE_S


class Part:
    """One process and those that take its place."""

    def __init__(self, command: PartCommand, *, folder: Path) -> None:
        self.command = command
        self.log_path = folder / f"{command.name}.log"
        self.num_starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def usage(self) -> psutil.Process:
        """For questions about memory, threads and descriptors."""
        return psutil.Process(self.pid)

    async def start(self) -> None:
        """Starts it, and keeps it running until `stop`."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process of now, if it lives."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def terminate(self) -> None:
        """Ends it in order; it is started again, with the command of then."""
        self.signal(signal.SIGTERM)

    async def stop(self) -> int:
        """Ends it in order; returns its exit code, and kills it where it does not end."""
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        assert self._process is not None
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self._process.wait(), STOP_GRACE_S)
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()
        finally:
            self._close_input()

    async def _keep(self) -> None:
        while True:
            assert self._process is not None
            await self._process.wait()
            self._close_input()
            await asyncio.sleep(self.command.restart_pause_s)
            await self._spawn()

    async def _spawn(self) -> None:
        self.num_starts += 1
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self.command.module, *self.command.arguments),
                cwd=ROOT,
                env=os.environ | ONE_THREAD | {"PYTHONPATH": f"{ROOT}:{ROOT}/protos/generated"},
                stdin=asyncio.subprocess.PIPE,  # its end is the end of what it was started for
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _close_input(self) -> None:
        assert self._process is not None
        if self._process.stdin is not None:
            self._process.stdin.close()
