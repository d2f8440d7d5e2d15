"""Runs a mesh from its start to its end: the body of the foreground command and of the
background process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from core.errors import InvalidInput, NotFound, shown
from services.common.audit import AuditLog, Detail, this_user
from services.common.identity import SUPERVISOR
from services.local.identities import credentials_for
from services.local.layout import MeshLayout, ReplicaLayout
from services.local.mesh import Mesh
from services.local.ports import HOST, free_ports
from services.local.process import MeshProcess
from services.local.progress import StageProgress, wait_until_ready
from services.local.run_folder import MeshRecord, RunFolder, record_process
from services.local.supervisor_service import serve_supervisor
from services.local.waiting import first_of, stop_on_signals

_LONGEST_PATH_BYTES = 4096


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
        credentials = credentials_for(layout.certs, SUPERVISOR)
        supervisor = Supervisor(layout, run_folder=run_folder, say=listener.say)
        mesh = supervisor.mesh
        async with _audited(layout), mesh.running():
            supervisor.write_record()
            starting = wait_until_ready(
                layout.gateway_address,
                layout.coordinator_address,
                credentials=credentials,
                report=listener.progress,
                is_compiling=mesh.is_compiling,
            )
            await first_of(starting, mesh.fail_when_one_ends(), _wait(stop))
            if not stop.is_set():
                await first_of(
                    mesh.keep_alive(restarted=supervisor.write_record),
                    serve_supervisor(
                        supervisor,
                        run_folder.socket_path,
                        credentials=credentials,
                        say=listener.say,
                    ),
                    _serve(listener),
                    _wait(stop),
                )


@asynccontextmanager
async def _audited(layout: MeshLayout) -> AsyncIterator[None]:
    """Records the beginning and the end of a mesh."""
    log, actor = AuditLog(layout.audit_path), this_user()
    facts: dict[str, Detail] = {"model": layout.model_name, "gateway": layout.gateway_address}
    settings: dict[str, Detail] = {"stages": len(layout.stages), "keys": layout.require_keys}
    await asyncio.to_thread(log.record, "mesh started", actor, **facts, **settings)
    try:
        yield
    finally:
        await asyncio.to_thread(log.record, "mesh stopped", actor, **facts)


class Supervisor:
    """A mesh and what it is made of, as it changes."""

    def __init__(
        self, layout: MeshLayout, *, run_folder: RunFolder, say: Callable[[str], None]
    ) -> None:
        self.mesh = Mesh(layout.commands(), run_folder=run_folder, say=say)
        self._layout = layout
        self._run_folder = run_folder
        self._on_trial: dict[str, tuple[int, ReplicaLayout, MeshProcess]] = {}  # by address

    async def try_replica(
        self, stage_index: int, *, model_path: str, is_spare: bool
    ) -> MeshProcess:
        """Starts one more replica; raises InvalidInput where there is no such stage, or where the
        path could be no argument of a process."""
        if "\0" in model_path or len(model_path.encode()) > _LONGEST_PATH_BYTES:
            allowed = f"a path of at most {_LONGEST_PATH_BYTES} bytes"
            raise InvalidInput("model_path", model_path, allowed)
        listen, metrics = free_ports(2)
        on_trial = {one.number for index, one, _ in self._on_trial.values() if index == stage_index}
        replica = ReplicaLayout(
            number=self._layout.free_number(stage_index, besides=on_trial),
            address=f"{HOST}:{listen}",
            metrics_port=metrics,
            is_spare=is_spare,
            model_path=model_path,
        )
        process = await self.mesh.add(self._layout.stage_command(stage_index, replica))
        self._on_trial[replica.address] = stage_index, replica, process
        return process

    def is_on_trial(self, address: str) -> bool:
        return address in self._on_trial

    def keep_replica(self, address: str) -> None:
        """Makes a replica on trial a part of the mesh; raises NotFound where none listens there."""
        if address not in self._on_trial:
            raise NotFound(f"no replica on trial listens at {shown(address)}", field="address")
        stage_index, replica, process = self._on_trial.pop(address)
        self._layout = self._layout.with_replica(stage_index, replica)
        self.mesh.change(self._layout.coordinator_command())
        self.mesh.keep(process)

    async def end_trial(self, address: str) -> None:
        """Ends a replica, unless it is kept by now."""
        if self._on_trial.pop(address, None) is not None:
            await self.mesh.remove(address)

    async def stop_replica(self, address: str) -> None:
        """Ends a replica of the mesh for good; raises NotFound where none listens there."""
        self._layout = self._layout.without_replica(address)
        self.mesh.change(self._layout.coordinator_command())
        await self.mesh.remove(address)

    def write_record(self) -> None:
        """Writes down the processes as they are now."""
        layout = self._layout
        log = str(self._run_folder.log_path("mesh"))
        own = record_process("supervisor", os.getpid(), log=log)
        self._run_folder.write(
            MeshRecord(
                model=layout.model_name,
                model_path=layout.model_path,
                number_format=layout.number_format,
                gateway=layout.gateway_address,
                coordinator=layout.coordinator_address,
                certs=layout.certs,
                keys=layout.keys,
                processes=(own, *(process.record() for process in self.mesh.processes)),
            )
        )


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _serve(listener: Listener) -> None:
    await listener.ready()
    await asyncio.Event().wait()
