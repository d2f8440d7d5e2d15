"""Forks the processes of a mesh, which need not import then what they all need.

`python -m services.local.fork_server FD` imports it once, which takes a second that each stage
would take, and then forks whatever the supervisor asks for at the other end of the socket FD. A
request is a line of JSON, `{"number": N, "module": ..., "arguments": [...]}`, with two file
descriptors: of the log and of the lifeline (see `services.local.child`). The answer is
`{"started": PID, "number": N}`, and `{"ended": PID, "code": CODE}` follows whenever that has ended.
The server ends with the socket; what it has forked does not.

It runs one thread and opens nothing that a fork must not share: gRPC, threads and event loops begin
in the children. Like `multiprocessing`'s fork server, but for logs, sessions and programs that run
as `python -m` runs them.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import select
import shlex
import signal
import socket
import sys
from typing import Any, NamedTuple

from services.local.child import ONE_THREAD, run_child

PROGRAMS = ("services.stage", "services.coordinator", "services.gateway")
# Children import these later: the first when they begin, the others when a stage loads its model.
LATER = (
    "setproctitle",
    "core.engine.cpu_backend",
    "core.engine.devices",
    "core.engine.engine",
    "core.models.registry",
    "services.common.kernel_cache",
)
LARGEST_READ = 1 << 16


class ForkServerHandle(NamedTuple):
    """A fork server that has been launched: the other end of its socket, and its process."""

    connection: socket.socket
    pid: int


def launch() -> ForkServerHandle:
    """Starts a fork server, with the environment of this process."""
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    command = [sys.executable, "-m", "services.local.fork_server", str(theirs.fileno())]
    with theirs:
        environment = os.environ | ONE_THREAD
        pid = os.posix_spawn(sys.executable, command, environment, file_actions=nowhere)
    return ForkServerHandle(ours, pid)


@functools.cache
def launched() -> ForkServerHandle:
    """The fork server of this process, which the first call starts: the sooner, the better."""
    return launch()


class Job(NamedTuple):
    """What a child is to run."""

    number: int
    module: str
    arguments: list[str]
    log_fd: int
    lifeline_fd: int


def preload() -> None:
    """Imports what children will run, and has numba set up what every compiled kernel needs."""
    for program in PROGRAMS:
        importlib.import_module(f"{program}.__main__")
        del sys.modules[f"{program}.__main__"]  # children run it anew
    for module in LATER:
        importlib.import_module(module)
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def serve(connection: socket.socket) -> Job | None:
    """Forks until the other end is closed; returns in each child what that is to run."""
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # what is ignored wakes nobody
    request = b""
    fds: list[int] = []
    while True:
        readable, _, _ = select.select([connection.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, LARGEST_READ)
            _reap(connection)
        if connection.fileno() not in readable:
            continue
        data, new_fds, _, _ = socket.recv_fds(connection, LARGEST_READ, 2)
        if not data:
            return None
        request += data
        fds += new_fds
        if not request.endswith(b"\n"):
            continue
        job = Job(**json.loads(request), log_fd=fds[0], lifeline_fd=fds[1])
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            os.close(woken)
            os.close(waker)
            return job
        _say(connection, started=pid, number=job.number)
        for fd in fds:
            os.close(fd)
        request, fds = b"", []


def _reap(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(connection, ended=pid, code=os.waitstatus_to_exitcode(status))


def _say(connection: socket.socket, **fields: Any) -> None:
    try:
        connection.sendall(json.dumps(fields).encode() + b"\n")
    except OSError:  # the supervisor has gone, which the next read says too
        return


def _run(job: Job) -> None:
    """As a process that was started for it: with a session, a log and a title of its own."""
    from setproctitle import setproctitle, setthreadtitle

    os.setsid()
    for fd in (1, 2):
        os.dup2(job.log_fd, fd)
    os.close(job.log_fd)
    setproctitle(shlex.join([sys.executable, "-m", job.module, *job.arguments]))
    setthreadtitle(job.module)
    run_child(job.lifeline_fd, job.module, job.arguments)


def main() -> None:
    os.setsid()  # Ctrl-C reaches the supervisor alone
    connection = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()  # an eighth of the time that imports take
    preload()
    gc.freeze()  # collections of the children pass over what they share
    gc.enable()
    if job := serve(connection):
        _run(job)
    else:
        os._exit(0)  # at once: those who wait for the end need nothing tidied up


if __name__ == "__main__":
    main()
