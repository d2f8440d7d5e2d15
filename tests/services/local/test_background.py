"""Ending a mesh that was started elsewhere."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from services.local.background import stop
from services.local.run_folder import MeshRecord, RunFolder, record_process


def test_stop_does_not_wait_for_a_process_that_has_ended_but_was_not_reaped(tmp_path: Path) -> None:
    # The parent never asks what became of its child, as the first process of a container may not.
    script = "sleep 60 & echo $!; exec sleep 60"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
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
