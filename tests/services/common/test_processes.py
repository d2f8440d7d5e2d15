"""Processes: signals drain and stop them, failing tasks end them, orphans do not stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import asyncio, sys
from core.errors import CorruptWeights
from services.common.servers import bind, create_server, run_process, run_until_stopped
from services.common.telemetry import no_telemetry

async def drain():
    print("drained", flush=True)

async def fail():
    raise CorruptWeights("model.gguf is cut short\\nby 7 bytes")

async def finish():
    print("task done", flush=True)

async def main(mode):
    server = create_server(no_telemetry())
    bind(server, "127.0.0.1:0")
    await server.start()
    print("ready", flush=True)
    await run_until_stopped(
        server,
        tasks=[fail() if mode == "fail" else finish()],
        drain=drain,
        exit_with_parent=mode == "orphan",
    )

run_process(main(sys.argv[1]))
"""


@contextmanager
def running(mode: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_ends_with_exit_code_0(number: signal.Signals) -> None:
    with running("serve") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "task done\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert out == "drained\n"
    assert err == ""
    assert process.returncode == 0


def test_a_failing_task_ends_the_process_with_one_line_and_exit_code_1() -> None:
    with running("fail") as process:
        out, err = process.communicate(timeout=30)
    assert err == "error: model.gguf is cut short by 7 bytes\n"
    assert out == ""
    assert process.returncode == 1


def test_a_process_ends_when_its_parent_closes_the_pipe() -> None:
    with running("orphan") as process:
        out, _ = process.communicate(timeout=30)
    assert out.endswith("drained\n")
    assert process.returncode == 0
