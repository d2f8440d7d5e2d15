"""Starts, watches and ends the processes of one mesh.

The parts may start in any order: each waits for its neighbours. A part that ends while
the mesh starts ends the start; one that ends while the mesh serves is started again, after a
pause that doubles, until it has failed too often.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from core.errors import Unavailable
from services.common.logs import COMPILING
from services.local.process import MeshProcess, ProcessCommand, describe_exit
from services.local.run_folder import RunFolder
from services.local.waiting import first_of

STOP_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How a mesh treats processes that end, and those that do not."""

    # Pause before the first restart of a process; it doubles with each one that follows soon.
    first_pause_s: float = 0.2
    # Restarts of all processes within the window; one more, and the mesh gives up.
    most_restarts: int = 5
    window_s: float = 60.0
    # From SIGTERM to SIGKILL.
    stop_grace_s: float = STOP_GRACE_S


class Mesh:
    """The processes of a mesh.

    `say` is called with one line for people whenever something happened that nobody asked for.
    """

    def __init__(
        self,
        commands: tuple[ProcessCommand, ...],
        *,
        run_folder: RunFolder,
        say: Callable[[str], None],
        patience: Patience = Patience(),
    ) -> None:
        self._say = say
        self._patience = patience
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._restarts_at: deque[float] = deque(maxlen=patience.most_restarts)
        self.processes = tuple(
            MeshProcess(
                command,
                log_path=run_folder.log_path(command.name),
                lifeline_fd=self._lifeline_read,
            )
            for command in commands
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Starts all processes; ends them all on the way out, whatever the reason."""
        try:
            for process in self.processes:
                process.log_path.unlink(missing_ok=True)
                await process.start()
            yield
        finally:
            await self._stop()
            os.close(self._lifeline_read)
            os.close(self._lifeline_write)

    def is_compiling(self, stage_index: int) -> bool:
        """Whether the last that a stage has logged is that it compiles its kernels."""
        return self.processes[stage_index].last_words() == COMPILING

    async def fail_when_one_ends(self) -> None:
        """Waits until a process ends; raises Unavailable with its last words."""
        waits = {asyncio.create_task(process.wait()): process for process in self.processes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        process = waits[done.pop()]
        raise Unavailable(f"{process.name} ended: {process.last_words()} (log: {process.log_path})")

    async def keep_alive(self, *, restarted: Callable[[], None]) -> None:
        """Starts processes again that end, and calls `restarted` after each time.

        Raises Unavailable when one ends too often.
        """
        waits = [self._keep_one_alive(process, restarted) for process in self.processes]
        await first_of(*waits)

    async def _keep_one_alive(self, process: MeshProcess, restarted: Callable[[], None]) -> None:
        patience = self._patience
        pause_s = patience.first_pause_s
        loop = asyncio.get_running_loop()
        while True:
            started_at = loop.time()
            code = await process.wait()
            if loop.time() - started_at > patience.window_s:
                pause_s = patience.first_pause_s
            self._count_restart(process, code)
            self._say(
                f"{process.name} ended ({describe_exit(code)}: {process.last_words()}); "
                f"starting it again in {pause_s:.1f} s"
            )
            await asyncio.sleep(pause_s)
            pause_s *= 2
            await process.start()
            restarted()

    def _count_restart(self, process: MeshProcess, code: int) -> None:
        now = asyncio.get_running_loop().time()
        patience = self._patience
        often = len(self._restarts_at) == patience.most_restarts
        if often and now - self._restarts_at[0] < patience.window_s:
            raise Unavailable(
                f"{process.name} ended again ({describe_exit(code)}: {process.last_words()}); "
                f"{patience.most_restarts} restarts within {patience.window_s:.0f} s did not help "
                f"(log: {process.log_path})"
            )
        self._restarts_at.append(now)

    async def _stop(self) -> None:
        """Ends the processes turn by turn: who asks before who is asked."""
        grace_s = self._patience.stop_grace_s
        for turn in sorted({process.command.stop_turn for process in self.processes}):
            async with asyncio.TaskGroup() as tasks:
                for process in self.processes:
                    if process.command.stop_turn == turn:
                        tasks.create_task(process.stop(grace_s=grace_s))
