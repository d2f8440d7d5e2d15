"""The supervisor's promises, kept with real processes that compute nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from core.errors import Unavailable
from services.common.logs import COMPILING
from services.local.mesh import Mesh, Patience
from services.local.process import MeshProcess, ProcessCommand
from services.local.run_folder import RunFolder, find_process

ROOT = Path(__file__).parents[3]


def part(name: str, *arguments: str, stop_turn: int = 0) -> ProcessCommand:
    return ProcessCommand(
        name=name,
        module="tests.support.part",
        arguments=arguments,
        address="first:0",
        metrics_port=0,
        stop_turn=stop_turn,
    )


async def said_something(process: MeshProcess, words: str = "") -> None:
    """Waits until a process is far enough to handle signals, or has said these words."""
    while not (said := process.log_path.read_bytes()) or words.encode() not in said:  # noqa: ASYNC110 (nothing announces a file's growth)
        await asyncio.sleep(0.01)


async def test_all_processes_have_ended_when_the_context_has(tmp_path: Path) -> None:
    mesh = Mesh(
        (part("stage-0", "serve"), part("gateway", "serve")),
        run_folder=RunFolder(tmp_path),
        say=pytest.fail,
    )
    async with mesh.running():
        records = [process.record() for process in mesh.processes]
        assert all(find_process(record) for record in records)
        for process in mesh.processes:
            await said_something(process)
    assert not any(find_process(record) for record in records)


async def test_a_stage_that_compiles_its_kernels_is_told_from_one_that_loads(
    tmp_path: Path,
) -> None:
    line = json.dumps({"message": COMPILING, "number_format": "bf16"})
    mesh = Mesh(
        (part("stage-0", "serve"), part("stage-1", "say", line)),
        run_folder=RunFolder(tmp_path),
        say=pytest.fail,
    )
    async with mesh.running():
        for process in mesh.processes:
            await said_something(process)
        assert [mesh.is_compiling(name) for name in ("stage-0", "stage-1")] == [False, True]


async def test_processes_are_ended_turn_by_turn(tmp_path: Path) -> None:
    signatures = tmp_path / "signatures"
    parts = [
        part(name, "sign", str(signatures), name, stop_turn=turn)
        for turn, name in ((3, "stage"), (2, "coordinator"), (1, "gateway"))
    ]
    mesh = Mesh(tuple(parts), run_folder=RunFolder(tmp_path), say=pytest.fail)
    async with mesh.running():
        for process in mesh.processes:
            await said_something(process)
    assert signatures.read_text().split() == ["gateway", "coordinator", "stage"]


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    mesh = Mesh(
        (part("gateway", "stubborn"),),
        run_folder=RunFolder(tmp_path),
        say=pytest.fail,
        patience=Patience(stop_grace_s=0.2),
    )
    async with mesh.running():
        record = mesh.processes[0].record()
        await said_something(mesh.processes[0])
    assert find_process(record) is None


async def test_a_process_that_ends_early_fails_the_start_with_its_last_words(
    tmp_path: Path,
) -> None:
    mesh = Mesh(
        (part("stage-0", "fail"), part("gateway", "serve")),
        run_folder=RunFolder(tmp_path),
        say=pytest.fail,
    )
    async with mesh.running():
        with pytest.raises(Unavailable, match="stage-0 ended: error: no layers left"):
            await mesh.fail_when_one_ends()


async def test_a_process_that_dies_while_serving_is_started_again(tmp_path: Path) -> None:
    said_lines: list[str] = []
    mesh = Mesh((part("stage-0", "serve"),), run_folder=RunFolder(tmp_path), say=said_lines.append)
    restarted = asyncio.Event()
    async with mesh.running():
        before = mesh.processes[0].record()
        await said_something(mesh.processes[0])
        keeping = asyncio.create_task(mesh.keep_alive(restarted=restarted.set))
        os.kill(before.pid, signal.SIGKILL)
        await restarted.wait()
        assert find_process(mesh.processes[0].record()) is not None
        assert mesh.processes[0].record().pid != before.pid
        keeping.cancel()
    assert len(said_lines) == 1
    assert "stage-0 ended (signal SIGKILL" in said_lines[0]


async def test_the_first_restart_is_at_once_and_faults_of_others_do_not_count(
    tmp_path: Path,
) -> None:
    said_lines: list[str] = []
    names = ("stage-0", "stage-1", "coordinator")
    mesh = Mesh(
        tuple(part(name, "once", str(tmp_path / name)) for name in names),
        run_folder=RunFolder(tmp_path),
        say=said_lines.append,
        patience=Patience(most_restarts=1),
    )
    async with mesh.running():
        keeping = asyncio.create_task(mesh.keep_alive(restarted=lambda: None))
        for process in mesh.processes:
            await said_something(process, "serving")
        assert not keeping.done()
        keeping.cancel()
    assert len(said_lines) == len(names)
    assert all(line.endswith("starting it again at once") for line in said_lines)


@pytest.mark.parametrize(
    ("roles", "when"),
    [
        (("stage/0", "stage/0"), "in 0.1 s"),
        (("stage/0", "stage/1"), "at once"),
        (("", ""), "at once"),
    ],
)
async def test_a_restart_waits_a_little_while_another_process_does_the_work(
    tmp_path: Path, roles: tuple[str, str], when: str
) -> None:
    said_lines: list[str] = []
    restarted = asyncio.Event()
    mesh = Mesh(
        tuple(replace(part(f"part-{i}", "serve"), role=role) for i, role in enumerate(roles)),
        run_folder=RunFolder(tmp_path),
        say=said_lines.append,
        patience=Patience(stand_in_pause_s=0.1),
    )
    async with mesh.running():
        for process in mesh.processes:
            await said_something(process)
        keeping = asyncio.create_task(mesh.keep_alive(restarted=restarted.set))
        os.kill(mesh.processes[0].record().pid, signal.SIGKILL)
        await restarted.wait()
        keeping.cancel()
    assert said_lines[0].endswith(f"starting it again {when}")


async def test_processes_that_die_together_are_all_started_again(tmp_path: Path) -> None:
    names = ("stage-0", "stage-1", "gateway")
    mesh = Mesh(
        tuple(part(name, "serve") for name in names),
        run_folder=RunFolder(tmp_path),
        say=lambda _: None,
    )

    def record_all() -> None:
        for process in mesh.processes:
            process.record()
        num_restarts.release()

    num_restarts = asyncio.Semaphore(0)
    async with mesh.running():
        keeping = asyncio.create_task(mesh.keep_alive(restarted=record_all))
        for process in mesh.processes:
            await said_something(process)
        for process in mesh.processes:
            os.kill(process.record().pid, signal.SIGKILL)
        for _ in names:
            await num_restarts.acquire()
        assert all(find_process(process.record()) for process in mesh.processes)
        assert not keeping.done()
        keeping.cancel()


async def test_a_process_can_be_added_and_is_kept_alive_only_when_told_so(tmp_path: Path) -> None:
    changed = asyncio.Event()
    mesh = Mesh((part("stage-0", "serve"),), run_folder=RunFolder(tmp_path), say=lambda _: None)
    async with mesh.running():
        keeping = asyncio.create_task(mesh.keep_alive(restarted=changed.set))
        await said_something(mesh.processes[0])
        added = await mesh.add(replace(part("stage-0-b", "serve"), address="second:0"))
        await said_something(added)
        os.kill(added.record().pid, signal.SIGKILL)
        assert await added.wait() == -signal.SIGKILL
        changed.clear()
        mesh.keep(added)
        await changed.wait()
        before = added.record()
        assert find_process(before) is not None
        await mesh.remove("second:0")
        assert find_process(before) is None
        assert [process.name for process in mesh.processes] == ["stage-0"]
        assert not keeping.done()
        keeping.cancel()


async def test_a_process_that_keeps_dying_ends_the_mesh(tmp_path: Path) -> None:
    said_lines: list[str] = []
    mesh = Mesh(
        (part("stage-0", "fail"), part("gateway", "serve")),
        run_folder=RunFolder(tmp_path),
        say=said_lines.append,
        patience=Patience(first_pause_s=0.001, most_restarts=3),
    )
    async with mesh.running():
        with pytest.raises(Unavailable, match="3 restarts within 60 s did not help"):
            await mesh.keep_alive(restarted=lambda: None)
    assert len(said_lines) == 3


def test_no_process_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = """
        import asyncio, sys
        from pathlib import Path
        from services.local.mesh import Mesh
        from services.local.run_folder import RunFolder
        from tests.services.local.test_mesh import part, said_something

        async def main():
            parts = (part("stage-0", "serve"), part("gateway", "serve"))
            mesh = Mesh(parts, run_folder=RunFolder(Path(sys.argv[1])), say=print)
            async with mesh.running():
                for process in mesh.processes:
                    await said_something(process)
                print("up", flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
        children = psutil.Process(supervisor.pid).children()
        supervisor.kill()
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
