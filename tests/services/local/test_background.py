"""Starting a mesh that outlives its starter, and ending one that was started elsewhere."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from core.errors import Unavailable
from services.local.background import start_in_background, stop
from services.local.run_folder import MeshRecord, RunFolder, record_process
from services.local.supervisor import Listener

# Says that it is ready, closes its stdout as a supervisor does, and goes on.
LASTING = """
import json, os, pathlib, sys, time
sys.stdin.read()
(pathlib.Path(sys.argv[1]) / "pid").write_text(str(os.getpid()))
print(json.dumps({"ready": True}), flush=True)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
time.sleep(60)
"""
# Never asks what became of its child, as the first process of a container may not; a shell does,
# until it has become another program.
PARENT = """
import subprocess, time
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""
FAILING = """print('{"error": "no memory"}')"""


def start(script: str, folder: Path) -> bool:
    """Runs a script as the supervisor, from an event loop that has ended when this returns; returns
    whether the script was ready."""
    was_ready = False

    async def ready() -> None:
        nonlocal was_ready
        was_ready = True

    listener = Listener(progress=lambda _: None, ready=ready, say=lambda _: None)
    layout: Any = SimpleNamespace(to_json=lambda: "{}")
    asyncio.run(
        start_in_background(
            layout,
            run_folder=RunFolder(folder),
            listener=listener,
            supervisor=(sys.executable, "-c", script),
        )
    )
    gc.collect()
    return was_ready


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_mesh_goes_on_when_the_event_loop_of_its_starter_has_ended(tmp_path: Path) -> None:
    assert start(LASTING, tmp_path)
    supervisor = psutil.Process(int((tmp_path / "pid").read_text()))
    assert supervisor.status() != psutil.STATUS_ZOMBIE
    supervisor.kill()


def test_a_mesh_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no memory"):
        start(FAILING, tmp_path)


def test_stop_does_not_wait_for_a_process_that_has_ended_but_was_not_reaped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            supervisor = record_process("supervisor", int(parent.stdout.readline()))
            record = MeshRecord(
                model="tiny",
                model_path="/models/tiny.gguf",
                number_format="bf16",
                gateway="127.0.0.1:8001",
                coordinators=("127.0.0.1:9000",),
                processes=(supervisor,),
            )
            folder = RunFolder(tmp_path)
            folder.write(record)
            started_s = time.monotonic()
            assert stop(folder) == record
            assert time.monotonic() - started_s < 5
            assert psutil.Process(supervisor.pid).status() == psutil.STATUS_ZOMBIE
        finally:
            parent.kill()
