"""One child process of the mesh: how it is started, what it said last, how it is ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.local.child import ONE_THREAD
from services.local.forking import ForkedProcess, ForkServer, ForkServerLost
from services.local.run_folder import ProcessRecord, record_process


@dataclass(frozen=True, kw_only=True)
class ProcessCommand:
    """What to run. `name` is for people: "gateway", "coordinator", "stage-0".

    Processes with a smaller `stop_turn` are ended first, those with the same together. Those of the
    same `role`, unless it is "", can take each other's work. Those that may compute on a GPU
    are not forked: nothing of its driver may have begun before.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    address: str
    metrics_port: int
    stop_turn: int = 0
    role: str = ""
    can_be_forked: bool = True

    @property
    def ports(self) -> tuple[int, int]:
        return int(self.address.rpartition(":")[2]), self.metrics_port


class MeshProcess:
    """A process of the mesh, which may be started again after it has ended."""

    def __init__(
        self,
        command: ProcessCommand,
        *,
        log_path: Path,
        lifeline_fd: int,
        fork_server: ForkServer | None = None,
    ) -> None:
        """Without a fork server, or when that is lost, it starts as any process does."""
        self.command = command
        self.log_path = log_path
        self._lifeline_fd = lifeline_fd
        self._fork_server = fork_server if command.can_be_forked else None
        self._process: asyncio.subprocess.Process | ForkedProcess | None = None
        self._record: ProcessRecord | None = None

    @property
    def name(self) -> str:
        return self.command.name

    async def start(self) -> None:
        """Starts it; its output goes to the log file, after what it said in earlier lives.

        It gets a session of its own, so that Ctrl-C reaches the supervisor alone, which then
        ends the parts in order.
        """
        with self.log_path.open("ab") as log:
            self._process = await self._fork(log) or await self._execute(log)
        self._record = record_process(
            self.name,
            self._process.pid,
            address=self.command.address,
            metrics_port=self.command.metrics_port,
            log=str(self.log_path),
        )

    async def _fork(self, log: BinaryIO) -> ForkedProcess | None:
        if self._fork_server is None:
            return None
        module, arguments = self.command.module, self.command.arguments
        try:
            return await self._fork_server.start(
                module, arguments, log_fd=log.fileno(), lifeline_fd=self._lifeline_fd
            )
        except ForkServerLost:
            return None

    async def _execute(self, log: BinaryIO) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.local.child",
            str(self._lifeline_fd),
            self.command.module,
            *self.command.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(self._lifeline_fd,),
            start_new_session=True,
            env=os.environ | ONE_THREAD,
        )

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        """Waits for its end; returns the exit code, negative for a signal."""
        assert self._process is not None
        return await self._process.wait()

    def record(self) -> ProcessRecord:
        """Describes it, as it was started last, for the run folder."""
        assert self._record is not None
        return self._record

    async def stop(self, *, grace_s: float) -> None:
        """Asks it to drain, and kills it when it has not ended after `grace_s`."""
        if self._process is None or not self.is_running:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def last_words(self) -> str:
        """The last line of its log, as a sentence where it is a structured one."""
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return readable(lines[-1]) if lines else "it said nothing"


def readable(line: str) -> str:
    """The message of a structured log line; any other line as it is."""
    try:
        fields = json.loads(line)
    except ValueError:
        return line.strip()
    if not isinstance(fields, dict):
        return line.strip()
    return str(fields.get("message") or fields.get("event") or line).strip()


def describe_exit(code: int) -> str:
    """An exit code for people: "exit code 1", "signal SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"
