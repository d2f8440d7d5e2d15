"""Runs a mesh from its start to its end: the body of the foreground command and of the
background process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from services.local.layout import MeshLayout
from services.local.mesh import Mesh
from services.local.progress import StageProgress, wait_until_ready
from services.local.run_folder import MeshRecord, RunFolder, record_process
from services.local.waiting import first_of, stop_on_signals


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who wants to know. `say` gets lines about what nobody asked for, such as restarts;
    `ready` is awaited once, beside the running mesh."""

    progress: Callable[[list[StageProgress]], None]
    ready: Callable[[], Awaitable[None]]
    say: Callable[[str], None]


async def supervise(layout: MeshLayout, *, run_folder: RunFolder, listener: Listener) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; all processes have ended when this returns.

    Raises Exhausted when a mesh runs already, Unavailable when a part fails to start or fails
    too often.
    """
    with run_folder.claim():
        stop = stop_on_signals()
        mesh = Mesh(layout.commands(), run_folder=run_folder, say=listener.say)

        def write_record() -> None:
            run_folder.write(_record(layout, mesh, log=run_folder.log_path("mesh")))

        async with mesh.running():
            write_record()
            starting = wait_until_ready(
                layout.gateway_address,
                layout.coordinator_address,
                report=listener.progress,
                is_compiling=mesh.is_compiling,
            )
            await first_of(starting, mesh.fail_when_one_ends(), _wait(stop))
            if not stop.is_set():
                await first_of(
                    mesh.keep_alive(restarted=write_record), _serve(listener), _wait(stop)
                )


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _serve(listener: Listener) -> None:
    await listener.ready()
    await asyncio.Event().wait()


def _record(layout: MeshLayout, mesh: Mesh, *, log: Path) -> MeshRecord:
    supervisor = record_process("supervisor", os.getpid(), log=str(log))
    return MeshRecord(
        model=layout.model_name,
        model_path=layout.model_path,
        number_format=layout.number_format,
        gateway=layout.gateway_address,
        coordinator=layout.coordinator_address,
        processes=(supervisor, *(process.record() for process in mesh.processes)),
    )
