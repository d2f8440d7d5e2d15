"""One child process of the mesh: how it is started, what it said last, how it is ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from services.local.run_folder import ProcessRecord, record_process

# Each process computes on one thread of its own: pools of threads larger than the cores that
# a process really has make each other wait.
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "RAYON_NUM_THREADS",
    )
}


@dataclass(frozen=True, kw_only=True)
class ProcessCommand:
    """What to run. `name` is for people: "gateway", "coordinator", "stage-0".

    Processes with a smaller `stop_turn` are ended first, those with the same together. Those of the
    same `role`, unless it is "", can take each other's work.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    address: str
    metrics_port: int
    stop_turn: int = 0
    role: str = ""

    @property
    def ports(self) -> tuple[int, int]:
        return int(self.address.rpartition(":")[2]), self.metrics_port


class MeshProcess:
    """A process of the mesh, which may be started again after it has ended."""

    def __init__(self, command: ProcessCommand, *, log_path: Path, lifeline_fd: int) -> None:
        self.command = command
        self.log_path = log_path
        self._lifeline_fd = lifeline_fd
        self._process: asyncio.subprocess.Process | None = None
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
            self._process = await asyncio.create_subprocess_exec(
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
        self._record = record_process(
            self.name,
            self._process.pid,
            address=self.command.address,
            metrics_port=self.command.metrics_port,
            log=str(self.log_path),
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
