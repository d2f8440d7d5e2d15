"""A real mesh on this machine, started as a user starts one, apart from the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.cli.how_to_call import QUESTION
from services.local.run_folder import MeshRecord, RunFolder

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 90.0


@dataclass(frozen=True, kw_only=True)
class LocalMesh:
    """Runs `penstock` commands against a run folder of its own.

    `environment` is added to what the commands inherit, less the options that a surrounding
    `make` hands down. Stages of one that `is_slowable` look for their pace before each step.
    """

    runtime: Path
    environment: Mapping[str, str]
    is_slowable: bool = False

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.runtime / "penstock")

    @property
    def record(self) -> MeshRecord:
        """What runs now; fails where nothing does."""
        record = self.run_folder.running()
        assert record is not None, "no mesh is running"
        return record

    @property
    def address(self) -> str:
        """Where the gateway answers."""
        return self.record.gateway

    def variables(self) -> dict[str, str]:
        """The environment of every command."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
            and (name == "PENSTOCK_CACHE" or not name.startswith("PENSTOCK_"))
        }
        own = {"XDG_RUNTIME_DIR": str(self.runtime), "XDG_DATA_HOME": str(self.runtime / "data")}
        if self.is_slowable:
            own["PENSTOCK_SLOW_DOWN_FILE"] = str(self._pace_file)
        return inherited | own | dict(self.environment)

    @property
    def _pace_file(self) -> Path:
        return self.runtime / "pace"

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """Steps take a hundred times as long meanwhile: an answer lasts until others are done."""
        assert self.is_slowable, "its stages do not look"
        self._pace_file.write_text("100")
        try:
            yield
        finally:
            self._pace_file.unlink()

    def popen(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a command and leaves it running; stdout and stderr come in one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "services.cli", *arguments],
            cwd=ROOT,
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(
        self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; its output is text, its exit code is not judged."""
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments],
            cwd=ROOT,
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *options: str) -> str:
        """Starts a mesh in the background on free ports; returns what the command printed."""
        ports = ("--grpc-port", "0", "--metrics-port", "0")
        done = self.run("mesh", "--detach", *ports, *options, timeout_s=START_TIMEOUT_S)
        assert done.returncode == 0, f"the mesh did not start:\n{done.stdout}{done.stderr}"
        return done.stdout

    def start_timed(self, *options: str) -> float:
        """Like `start`; returns the seconds from the command to the first answer's first text."""
        started_at = time.monotonic()
        ports = ("--grpc-port", "0", "--metrics-port", "0")
        with self.popen("mesh", "--detach", *ports, *options) as process:
            assert process.stdout is not None
            printed = []
            for line in process.stdout:
                printed.append(line)
                if QUESTION.encode() in line:
                    break
            first = process.stdout.read(1)
            first_token_s = time.monotonic() - started_at
            printed.append(first + process.stdout.read())
        assert process.returncode == 0, "the mesh did not start:\n" + b"".join(printed).decode()
        assert first, "the mesh ended before its first answer"
        return first_token_s

    def stop(self) -> None:
        """Ends what runs; nothing running is fine."""
        done = self.run("stop")
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def until(is_so: Callable[[], bool]) -> None:
    """Waits until something is so that nobody announces; fails when it never is."""
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.02)
