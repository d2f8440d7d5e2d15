"""Starts a mesh in the background, and ends one wherever it was started."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

import psutil

from core.errors import Unavailable
from services.local.fork_server import ForkServerHandle
from services.local.layout import MeshLayout
from services.local.mesh import STOP_GRACE_S
from services.local.progress import StageProgress
from services.local.run_folder import MeshRecord, RunFolder, find_process
from services.local.supervisor import Listener

# Gateway, coordinator and stages end in turn; each may take its whole grace.
STOP_TIMEOUT_S = 3 * STOP_GRACE_S + 5.0
POLL_S = 0.02
SUPERVISOR = (sys.executable, "-m", "services.local")


async def start_in_background(
    layout: MeshLayout,
    *,
    run_folder: RunFolder,
    listener: Listener,
    fork_server: ForkServerHandle | None = None,
    supervisor: Sequence[str] = SUPERVISOR,
) -> None:
    """Returns when the mesh is ready, and leaves it running.

    `supervisor` is the command that runs it, and is given the folder and the fork server. Raises
    Unavailable, saying why, when it is not ready; then nothing is left running. A caller that is
    cancelled meanwhile takes the mesh down with it.
    """
    process = _start(supervisor, run_folder, fork_server)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    try:
        await asyncio.to_thread(_hand_over, stdin, layout.to_json())
        await _follow(process, stdout, listener)
    except BaseException:
        if process.poll() is None:
            process.terminate()
            await asyncio.to_thread(process.wait)
        raise
    finally:
        stdout.close()


def _start(
    supervisor: Sequence[str], run_folder: RunFolder, fork_server: ForkServerHandle | None
) -> subprocess.Popen[bytes]:
    """Not a process of asyncio's, which kills those that outlive the event loop."""
    passed = () if fork_server is None else (fork_server.connection.fileno(), fork_server.pid)
    run_folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with run_folder.log_path("mesh").open("wb") as log:
        return subprocess.Popen(
            [*supervisor, str(run_folder.path), *map(str, passed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            pass_fds=passed[:1],
        )


def _hand_over(stdin: IO[bytes], text: str) -> None:
    with suppress(BrokenPipeError), stdin:  # one that has ended says why on its own
        stdin.write(text.encode())


async def _follow(process: subprocess.Popen[bytes], stdout: IO[bytes], listener: Listener) -> None:
    """Passes on what the supervisor says until it is ready."""
    while line := await asyncio.to_thread(stdout.readline):
        fields = json.loads(line)
        if "progress" in fields:
            listener.progress([StageProgress(**stage) for stage in fields["progress"]])
        elif "error" in fields:
            await asyncio.to_thread(process.wait)
            raise Unavailable(fields["error"])
        else:
            await listener.ready()
            return
    code = await asyncio.to_thread(process.wait)
    raise Unavailable(f"the mesh ended before it was ready (exit code {code})")


def stop(run_folder: RunFolder) -> MeshRecord | None:
    """Ends the mesh of the folder; returns what ran, or None when nothing did.

    The supervisor ends its parts in order. Parts of a supervisor that was killed end by
    themselves; whatever is left of either after the time for that is killed.
    """
    record = run_folder.read()
    if record is None:
        return None
    if not (living := _living(record)):
        return None
    if find_process(record.supervisor) is not None:
        _signal(living[0], signal.SIGTERM)
    _wait_until_gone(record, timeout_s=STOP_TIMEOUT_S)
    for process in _living(record):
        _signal(process, signal.SIGKILL)
    _wait_until_gone(record, timeout_s=STOP_GRACE_S)
    return record


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):  # it ended a moment ago
        process.send_signal(number)


def _living(record: MeshRecord) -> list[psutil.Process]:
    return [found for one in record.processes if (found := find_process(one)) is not None]


def _wait_until_gone(record: MeshRecord, *, timeout_s: float) -> None:
    """Waits for their ends, but not until they are reaped: that is for a parent that may be slow
    or never do it, the first process of a container say."""
    deadline_s = time.monotonic() + timeout_s
    while _living(record) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
