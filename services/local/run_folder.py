"""Where the running mesh is written down, so that a later command finds it.

One mesh runs at a time in a folder: its supervisor holds a lock for as long as it
lives. The kernel drops the lock with the process, so a killed supervisor leaves no
stale claim behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from core.errors import Exhausted


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """A process of the mesh. `started_at` (seconds since the epoch) tells it from a later
    process with the same pid."""

    name: str
    pid: int
    started_at: float
    address: str
    metrics_port: int
    log: str


@dataclass(frozen=True, kw_only=True)
class MeshRecord:
    """The running mesh. The supervisor's own record comes first in `processes`."""

    model: str
    model_path: str
    number_format: str
    gateway: str
    coordinators: tuple[str, ...]
    wire: str = "f32"  # codec of activations between stages
    certs: str = ""  # folder of the processes' identities; empty: all in the clear
    processes: tuple[ProcessRecord, ...]
    # Folder with the keys of a sealed model; "": it is not sealed.
    seal_keys: str = ""

    @property
    def supervisor(self) -> ProcessRecord:
        return self.processes[0]


def default_folder() -> Path:
    """$XDG_RUNTIME_DIR/penstock, or ~/.cache/penstock/run where there is no such folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "penstock"
    return Path.home() / ".cache" / "penstock" / "run"


class RunFolder:
    """The lock, the record and the logs of one mesh."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path / "mesh.lock"
        self._record_path = path / "mesh.json"
        self.stages_path = path / "stages.json"  # what coordinators are told of stage processes

    @property
    def socket_path(self) -> Path:
        """Where the supervisor listens."""
        return self.path / "supervisor.sock"

    def log_path(self, name: str) -> Path:
        """Log file of a process, such as `stage-0`."""
        return self.path / f"{name}.log"

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Holds the folder for the mesh of this process; raises Exhausted when it is taken."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock_path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Exhausted(self._taken_message()) from None
            try:
                yield
            finally:
                self._record_path.unlink(missing_ok=True)
                self.stages_path.unlink(missing_ok=True)

    def is_claimed(self) -> bool:
        """Whether a supervisor lives."""
        try:
            with self._lock_path.open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def refuse_if_claimed(self) -> None:
        """Raises Exhausted when a mesh runs."""
        if self.is_claimed():
            raise Exhausted(self._taken_message())

    def write(self, record: MeshRecord) -> None:
        """Replaces the record in one step, so that a reader never sees half of it."""
        _write(self._record_path, json.dumps(asdict(record), indent=1))

    def write_stages(self, text: str) -> None:
        """Replaces what coordinators read, likewise."""
        _write(self.stages_path, text)

    def read(self) -> MeshRecord | None:
        """The record of the last mesh, which may have died without removing it."""
        try:
            fields = json.loads(self._record_path.read_text())
            processes = tuple(ProcessRecord(**process) for process in fields.pop("processes"))
            coordinators = tuple(fields.pop("coordinators"))
            return MeshRecord(processes=processes, coordinators=coordinators, **fields)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def running(self) -> MeshRecord | None:
        """The record of the mesh that runs now; None when none does."""
        return self.read() if self.is_claimed() else None

    def _taken_message(self) -> str:
        record = self.read()
        if record is None:
            return "a mesh is already starting: stop it with `make stop`"
        port = record.gateway.rsplit(":", 1)[1]
        return (
            f"a mesh is already running (pid {record.supervisor.pid}, port {port}): "
            "stop it with `make stop`"
        )


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def record_process(
    name: str, pid: int, *, address: str = "", metrics_port: int = 0, log: str = ""
) -> ProcessRecord:
    """Describes a process of ours that has just been started."""
    try:
        started_at = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:  # it has ended already
        started_at = time.time()
    return ProcessRecord(
        name=name,
        pid=pid,
        started_at=started_at,
        address=address,
        metrics_port=metrics_port,
        log=log,
    )


def find_process(record: ProcessRecord) -> psutil.Process | None:
    """The process of a record, if it still lives and is no other with the same pid."""
    try:
        process = psutil.Process(record.pid)
        # The clock that start times are counted from can be adjusted by a little.
        same = abs(process.create_time() - record.started_at) < 2.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None
