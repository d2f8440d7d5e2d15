"""Runs a mesh from its start to its end: the body of the foreground command and of the
background process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from core.errors import Exhausted, InvalidInput, NotFound, shown
from core.pipeline.plan import StageSlice
from services.common.audit import AuditLog, Detail, this_user
from services.common.identity import SUPERVISOR
from services.local.fork_server import ForkServerHandle
from services.local.forking import ForkServer
from services.local.identities import credentials_for, issue_missing
from services.local.layout import MeshLayout, ReplicaLayout
from services.local.mesh import Mesh
from services.local.ports import HOST, HeldPorts
from services.local.process import MeshProcess
from services.local.progress import StageProgress, wait_until_ready
from services.local.recut import NewReplica, Recut, free_number, plan_recut
from services.local.run_folder import MeshRecord, RunFolder, record_process
from services.local.supervisor_service import serve_supervisor
from services.local.waiting import first_of, stop_on_signals

_LONGEST_PATH_BYTES = 4096
CheckRoom = Callable[[Sequence[StageSlice], MeshLayout], None]


def _check_room(slices: Sequence[StageSlice], layout: MeshLayout) -> None:
    # What reads models is imported when it is first needed: most meshes never change.
    from services.local.room import check_room

    check_room(slices, layout)


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Who wants to know. `say` gets lines about what nobody asked for, such as restarts;
    `ready` is awaited once, beside the running mesh."""

    progress: Callable[[list[StageProgress]], None]
    ready: Callable[[], Awaitable[None]]
    say: Callable[[str], None]


async def supervise(
    layout: MeshLayout,
    *,
    run_folder: RunFolder,
    listener: Listener,
    fork_server: ForkServerHandle | None = None,
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; all processes have ended when this returns.

    Processes start sooner with a fork server, which ends with the mesh.

    Raises Exhausted when a mesh runs already, Unavailable when a part fails to start or fails
    too often.
    """
    with run_folder.claim():
        stop = stop_on_signals()
        credentials = credentials_for(layout.certs, SUPERVISOR)
        supervisor = Supervisor(
            layout,
            run_folder=run_folder,
            say=listener.say,
            fork_server=ForkServer(fork_server) if fork_server else None,
        )
        mesh = supervisor.mesh
        supervisor.write_stages()
        async with _audited(layout), mesh.running():
            supervisor.write_record()
            starting = wait_until_ready(
                layout.gateway_address,
                [one.address for one in layout.coordinators],
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
        self,
        layout: MeshLayout,
        *,
        run_folder: RunFolder,
        say: Callable[[str], None],
        check_room: CheckRoom = _check_room,
        fork_server: ForkServer | None = None,
    ) -> None:
        """`check_room` raises PlanImpossible where a process for each slice does not fit."""
        layout = replace(layout, stages_file=str(run_folder.stages_path))
        self.mesh = Mesh(layout.commands(), run_folder=run_folder, say=say, fork_server=fork_server)
        self._fork_server = fork_server
        self._layout = layout
        self._run_folder = run_folder
        self._check_room = check_room
        self._on_trial: dict[str, tuple[int, ReplicaLayout, MeshProcess]] = {}  # by address
        self._recut: Recut | None = None  # the one on trial
        self._leaving: set[str] = set()  # addresses of processes of an earlier cut

    async def try_replica(
        self, stage_index: int, *, model_path: str, is_spare: bool
    ) -> MeshProcess:
        """Starts one more replica; raises InvalidInput where there is no such stage, or where the
        path could be no argument of a process, PlanImpossible where there is no room for it."""
        if "\0" in model_path or len(model_path.encode()) > _LONGEST_PATH_BYTES:
            allowed = f"a path of at most {_LONGEST_PATH_BYTES} bytes"
            raise InvalidInput("model_path", model_path, allowed)
        stage = self._layout.stage(stage_index)
        self._check_room([self._layout.slice_of(stage)], self._layout)
        replica = ReplicaLayout(
            number=free_number(stage_index, self._names),
            address=f"{HOST}:{self.mesh.ports.take()}",
            metrics_port=self.mesh.ports.take(),
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
        self.write_stages()
        self.mesh.keep(process)

    async def end_trial(self, address: str) -> None:
        """Ends a replica, unless it is kept by now."""
        if self._on_trial.pop(address, None) is not None:
            await self.mesh.remove(address)

    @property
    def _names(self) -> set[str]:
        return {process.name for process in self.mesh.processes}

    # --- another cut

    def begin_recut(self, split: str) -> Recut:
        """Puts a cut on trial, and starts nothing yet.

        Raises InvalidInput (no other cut of the model), PlanImpossible (several models in a stage,
        no room for both cuts at once, a codec that allows no other cut), Exhausted (another one is
        on trial), NotFound (a stage has no identity, and none can be made here).
        """
        if self._recut is not None:
            raise Exhausted("layers are being moved already")
        with HeldPorts() as ports:
            recut = plan_recut(self._layout, split, taken_names=self._names, ports=ports)
            self._check_room([one.stage_slice for one in recut.new], self._layout)
            self._settle_identities(recut)
            self.mesh.ports.take_over(ports)
        self._recut = recut
        return recut

    def _settle_identities(self, recut: Recut) -> None:
        if not self._layout.certs:
            return
        log = AuditLog(self._layout.audit_path)
        for role in issue_missing(self._layout.certs, (one.stage_index for one in recut.new)):
            log.record("certificate made", this_user(), role=role)

    async def start_new(self, recut: Recut, one: NewReplica) -> MeshProcess:
        """Starts a process of a cut on trial."""
        return await self.mesh.add(recut.layout.stage_command(one.stage_index, one.replica))

    def is_recut_on_trial(self, recut: Recut) -> bool:
        return self._recut is recut

    def keep_recut(self, split: str) -> Recut:
        """Makes the cut on trial that of the mesh; raises NotFound where it is not on trial. What
        leaves is not started again any more."""
        recut = self._recut
        if recut is None or recut.split != split:
            raise NotFound(f"no cut {shown(split)} is on trial", field="split")
        self._recut, self._layout = None, recut.layout
        self.write_stages()
        for one in recut.new:
            self.mesh.keep_at(one.replica.address)
        for address in recut.leaving:
            self.mesh.let_end(address)
        self._leaving |= recut.leaving
        return recut

    async def end_recut(self, recut: Recut) -> None:
        """Ends what was started for a cut, unless it is kept by now."""
        if self._recut is not recut:
            return
        self._recut = None
        running = {process.command.address for process in self.mesh.processes}
        for one in recut.new:
            if one.replica.address in running:
                await self.mesh.remove(one.replica.address)
            else:
                command = recut.layout.stage_command(one.stage_index, one.replica)
                self.mesh.ports.release(command.ports)

    async def stop_replica(self, address: str) -> None:
        """Ends a replica of the mesh for good; raises NotFound where none listens there."""
        if address in self._leaving:
            self._leaving.remove(address)
        else:
            self._layout = self._layout.without_replica(address)
            self.write_stages()
        await self.mesh.remove(address)

    def write_stages(self) -> None:
        """Writes down what a coordinator shall know that takes the stages over from now on."""
        self._run_folder.write_stages(self._layout.roster.to_json())

    def write_record(self) -> None:
        """Writes down the processes as they are now."""
        layout = self._layout
        log = str(self._run_folder.log_path("mesh"))
        processes = [record_process("supervisor", os.getpid(), log=log)]
        processes += [process.record() for process in self.mesh.processes]
        if self._fork_server is not None and not self._fork_server.is_lost:
            processes.append(record_process("fork-server", self._fork_server.pid, log=log))
        self._run_folder.write(
            MeshRecord(
                model=layout.model_name,
                model_path=layout.model_path,
                number_format=layout.number_format,
                gateway=layout.gateway_address,
                coordinators=tuple(one.address for one in layout.coordinators),
                wire=layout.wire,
                certs=layout.certs,
                seal_keys=layout.seal_keys,
                processes=tuple(processes),
            )
        )


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _serve(listener: Listener) -> None:
    await listener.ready()
    await asyncio.Event().wait()
