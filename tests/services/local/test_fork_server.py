"""The fork server's promises, kept with real processes that compute nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from core.errors import Unavailable
from services.local.fork_server import launch
from services.local.forking import UNKNOWN_CODE, ForkServer, ForkServerLost
from services.local.mesh import Mesh, Patience
from services.local.process import ProcessCommand
from services.local.run_folder import RunFolder, find_process
from tests.services.local.test_mesh import part, said_something


@asynccontextmanager
async def forked(
    folder: Path,
    *commands: ProcessCommand,
    server: ForkServer | None = None,
    say: Callable[[str], None] = pytest.fail,
) -> AsyncIterator[tuple[Mesh, ForkServer]]:
    """A mesh whose processes run and have said something."""
    server = server or ForkServer(launch())
    patience = Patience(stop_grace_s=2.0)
    run_folder = RunFolder(folder)
    mesh = Mesh(commands, run_folder=run_folder, say=say, patience=patience, fork_server=server)
    async with mesh.running():
        for process in mesh.processes:
            await said_something(process)
        yield mesh, server


def parent_of(pid: int) -> int:
    return psutil.Process(pid).ppid()


def title_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")


async def test_a_forked_process_is_like_one_that_was_started(tmp_path: Path) -> None:
    async with forked(tmp_path, part("stage-0", "serve"), part("gateway", "serve")) as (mesh, at):
        assert len(os.listdir(f"/proc/{at.pid}/task")) == 1  # a fork loses all other threads
        pids = [process.record().pid for process in mesh.processes]
        for pid in pids:
            assert parent_of(pid) == at.pid
            assert os.getsid(pid) == pid
            assert title_of(pid) == f"{sys.executable} -m tests.support.part serve"
            opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)]
            assert opened[0] == os.devnull
            assert {os.path.dirname(path) for path in opened[1:]} == {str(tmp_path)}
    assert not any(psutil.pid_exists(pid) for pid in (*pids, at.pid))


async def test_its_end_is_noticed_with_its_code_and_it_is_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    async with forked(tmp_path, part("stage-0", "serve"), say=said.append) as (mesh, at):
        (process,) = mesh.processes
        old = process.record()
        restarted = asyncio.Event()
        keeper = asyncio.create_task(mesh.keep_alive(restarted=restarted.set))
        os.kill(old.pid, signal.SIGKILL)
        await restarted.wait()
        assert process.record().pid != old.pid
        assert parent_of(process.record().pid) == at.pid
        keeper.cancel()
    assert len(said) == 1
    assert said[0].startswith("stage-0 ended (signal SIGKILL: serving); starting it again at once")


async def test_one_that_fails_early_ends_the_start_with_its_last_words(tmp_path: Path) -> None:
    async with forked(tmp_path, part("stage-0", "fail")) as (mesh, _):
        with pytest.raises(Unavailable, match="stage-0 ended: error: no layers left"):
            await mesh.fail_when_one_ends()
        assert await mesh.processes[0].wait() == 1


async def test_a_mesh_goes_on_without_its_fork_server(tmp_path: Path) -> None:
    commands = part("stage-0", "serve"), part("gateway", "serve")
    async with forked(tmp_path, *commands) as (mesh, server):
        stage, gateway = mesh.processes
        os.kill(server.pid, signal.SIGKILL)
        os.kill(stage.record().pid, signal.SIGKILL)
        assert await stage.wait() in (UNKNOWN_CODE, -signal.SIGKILL)
        await stage.start()
        assert server.is_lost
        assert parent_of(stage.record().pid) == os.getpid()
        assert find_process(gateway.record())
        assert gateway.is_running
        os.kill(gateway.record().pid, signal.SIGKILL)
        assert await gateway.wait() == UNKNOWN_CODE


async def test_a_fork_server_that_hangs_is_done_without(tmp_path: Path) -> None:
    handle = launch()
    os.kill(handle.pid, signal.SIGSTOP)
    server = ForkServer(handle, answer_timeout_s=0.2)
    async with forked(tmp_path, part("stage-0", "serve"), server=server) as (mesh, _):
        assert parent_of(mesh.processes[0].record().pid) == os.getpid()
    assert not psutil.pid_exists(handle.pid)


async def test_who_was_cancelled_gets_nothing_and_nobody_else_gets_it(tmp_path: Path) -> None:
    server = ForkServer(launch())
    reading, writing = os.pipe()
    with (tmp_path / "log").open("wb") as log:

        async def start(*arguments: str) -> int:
            process = await server.start(
                "tests.support.part", arguments, log_fd=log.fileno(), lifeline_fd=reading
            )
            return process.pid

        unwanted = asyncio.create_task(start("stubborn"))
        await asyncio.sleep(0)  # it asks
        unwanted.cancel()
        pid = await start("serve")
        others = [one for one in psutil.Process(server.pid).children() if one.pid != pid]
        assert not psutil.wait_procs(others, timeout=10)[1]
        assert psutil.Process(pid).is_running()
    os.close(writing)  # the lifeline
    await server.close()
    os.close(reading)
    with pytest.raises(ForkServerLost):
        await server.start("tests.support.part", ["serve"], log_fd=1, lifeline_fd=1)
