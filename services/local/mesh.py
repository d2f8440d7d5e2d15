"""Starts, watches and ends the processes of one mesh.

The parts may start in any order: each waits for its neighbours. A part that ends while
the mesh starts ends the start; one that ends while the mesh serves is started again, at once and
then after a pause that doubles, until it has failed too often. One whose work another one takes is
started a little later: a start takes a core for seconds, which restoring what was lost needs more.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from core.errors import NotFound, Unavailable, shown
from services.common.logs import COMPILING
from services.local.forking import ForkServer
from services.local.ports import HeldPorts
from services.local.process import MeshProcess, ProcessCommand, describe_exit
from services.local.run_folder import RunFolder

STOP_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How a mesh treats processes that end, and those that do not."""

    # Pause before the second restart of a process, the first being at once; it doubles with each
    # one that follows soon.
    first_pause_s: float = 0.2
    # Pause before the restart of a process while another one of its role runs.
    stand_in_pause_s: float = 2.0
    # Restarts of one process within the window; one more, and the mesh gives up.
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
        fork_server: ForkServer | None = None,
    ) -> None:
        self._say = say
        self._patience = patience
        self._fork_server = fork_server
        self.ports = HeldPorts()  # of its processes, until they are removed
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._run_folder = run_folder
        self._keepers: dict[MeshProcess, asyncio.Task[None]] = {}  # once it serves
        self._gave_up: asyncio.Future[None] | None = None  # likewise
        self._restarted: Callable[[], None] = lambda: None
        self.processes = [self._process(command) for command in commands]

    def _process(self, command: ProcessCommand) -> MeshProcess:
        return MeshProcess(
            command,
            log_path=self._run_folder.log_path(command.name),
            lifeline_fd=self._lifeline_read,
            fork_server=self._fork_server,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Starts all processes; ends them all on the way out, whatever the reason. Raises
        Unavailable where a stranger has one of their ports."""
        try:
            for process in self.processes:
                self.ports.hold(process.command.ports)
            for process in self.processes:
                await _start_afresh(process)
            yield
        finally:
            await self._stop()
            if self._fork_server is not None:
                await self._fork_server.close()
            self.ports.close()
            os.close(self._lifeline_read)
            os.close(self._lifeline_write)

    def is_compiling(self, name: str) -> bool:
        """Whether the last that a process has logged is that it compiles its kernels."""
        return any(
            process.last_words() == COMPILING for process in self.processes if process.name == name
        )

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
        """Starts processes again that end, and calls `restarted` whenever there are others.

        Raises Unavailable when one ends too often.
        """
        self._restarted = restarted
        self._gave_up = asyncio.get_running_loop().create_future()
        try:
            for process in self.processes:
                self.keep(process)
            await self._gave_up
        finally:
            for keeper in self._keepers.values():
                keeper.cancel()
            await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    async def add(self, command: ProcessCommand) -> MeshProcess:
        """Starts one more process, which is ended with the others, and not started again."""
        process = self._process(command)
        await _start_afresh(process)
        self.processes.append(process)
        self._restarted()
        return process

    def keep(self, process: MeshProcess) -> None:
        """Starts a process of a mesh that serves again from now on, whenever it ends."""
        keeper = asyncio.create_task(self._keep_one_alive(process))
        keeper.add_done_callback(self._on_kept)
        self._keepers[process] = keeper

    def keep_at(self, address: str) -> None:
        """As `keep`, the process that listens there; raises NotFound where none does."""
        self.keep(self._at(address))

    def let_end(self, address: str) -> None:
        """Has a process not be started again once it ends; raises NotFound where there is none."""
        if keeper := self._keepers.pop(self._at(address), None):
            keeper.cancel()

    async def remove(self, address: str) -> None:
        """Ends the process that listens there for good; raises NotFound where none does."""
        process = self._at(address)
        self.processes.remove(process)
        if process in self._keepers:
            self._keepers.pop(process).cancel()
        await process.stop(grace_s=self._patience.stop_grace_s)
        self.ports.release(process.command.ports)
        self._restarted()

    def _at(self, address: str) -> MeshProcess:
        for process in self.processes:
            if process.command.address == address:
                return process
        raise NotFound(f"no process listens at {shown(address)}", field="address")

    def _on_kept(self, keeper: asyncio.Task[None]) -> None:
        """A keeper ends by being cancelled, or when it has given up."""
        assert self._gave_up is not None
        if not keeper.cancelled() and (error := keeper.exception()) and not self._gave_up.done():
            self._gave_up.set_exception(error)

    async def _keep_one_alive(self, process: MeshProcess) -> None:
        patience = self._patience
        restarts_at: deque[float] = deque(maxlen=patience.most_restarts)
        pause_s = 0.0
        loop = asyncio.get_running_loop()
        while True:
            code = await process.wait()
            now = loop.time()
            if not restarts_at or now - restarts_at[-1] > patience.window_s:
                pause_s = 0.0
            if len(restarts_at) == patience.most_restarts:
                self._check_patience(process, code, since_s=now - restarts_at[0])
            restarts_at.append(now)
            courtesy_s = patience.stand_in_pause_s if self._has_stand_in(process) else 0.0
            wait_s = max(pause_s, courtesy_s)
            when = f"in {wait_s:.1f} s" if wait_s else "at once"
            self._say(
                f"{process.name} ended ({describe_exit(code)}: {process.last_words()}); "
                f"starting it again {when}"
            )
            await asyncio.sleep(wait_s)
            pause_s = max(2 * pause_s, patience.first_pause_s)
            await process.start()
            self._restarted()

    def _has_stand_in(self, process: MeshProcess) -> bool:
        role = process.command.role
        return bool(role) and any(
            other.command.role == role and other.is_running
            for other in self.processes
            if other is not process
        )

    def _check_patience(self, process: MeshProcess, code: int, *, since_s: float) -> None:
        patience = self._patience
        if since_s < patience.window_s:
            raise Unavailable(
                f"{process.name} ended again ({describe_exit(code)}: {process.last_words()}); "
                f"{patience.most_restarts} restarts within {patience.window_s:.0f} s did not help "
                f"(log: {process.log_path})"
            )

    async def _stop(self) -> None:
        """Ends the processes turn by turn: who asks before who is asked."""
        grace_s = self._patience.stop_grace_s
        for turn in sorted({process.command.stop_turn for process in self.processes}):
            async with asyncio.TaskGroup() as tasks:
                for process in self.processes:
                    if process.command.stop_turn == turn:
                        tasks.create_task(process.stop(grace_s=grace_s))


async def _start_afresh(process: MeshProcess) -> None:
    process.log_path.unlink(missing_ok=True)
    await process.start()
