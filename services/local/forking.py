"""The supervisor's end of the fork server: see `services.local.fork_server`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from services.local.fork_server import LARGEST_READ, ForkServerHandle
from services.local.run_folder import find_process, record_process

# Until it has imported all that it does, and answers; that takes a second or two.
ANSWER_TIMEOUT_S = 60.0
# It ends in milliseconds, unless it still imports.
END_TIMEOUT_S = 5.0
# What a process has exited with where nobody knows: the fork server, its parent, was gone before.
UNKNOWN_CODE = 255
POLL_S = 0.1


class ForkServerLost(Exception):
    """The fork server has ended, or does not answer."""


class ForkedProcess:
    """A process that the fork server has started; used like `asyncio.subprocess.Process`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._record = record_process(f"process {pid}", pid)

    async def wait(self) -> int:
        """Waits for its end; returns the exit code, negative for a signal."""
        return await asyncio.shield(self._code)

    @property
    def returncode(self) -> int | None:
        return self._code.result() if self._code.done() else None

    def send_signal(self, number: int) -> None:
        """Does nothing where it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def note_end(self, code: int) -> None:
        self._code.set_result(code)

    def can_be_seen(self) -> bool:
        """Whether the system says that it runs."""
        return find_process(self._record) is not None


class ForkServer:
    """Starts processes. To be made and used within one event loop."""

    def __init__(
        self, handle: ForkServerHandle, *, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self.pid = handle.pid
        self._connection = handle.connection
        self._connection.setblocking(False)
        self._answer_timeout_s = answer_timeout_s
        self._turn = asyncio.Lock()  # one request at a time
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[ForkedProcess]] = {}  # that somebody waits for
        self._rest = b""
        self._children: dict[int, ForkedProcess] = {}  # that have not ended
        self._watch: asyncio.Task[None] | None = None  # of these, once the server is lost
        self._hung_up = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._connection, self._on_readable)

    @property
    def is_lost(self) -> bool:
        return self._watch is not None

    async def start(
        self, module: str, arguments: Sequence[str], *, log_fd: int, lifeline_fd: int
    ) -> ForkedProcess:
        """Runs a module as `python -m` would; raises ForkServerLost."""
        async with self._turn:
            if self.is_lost:
                raise ForkServerLost
            number = next(self._numbers)
            wish = {"number": number, "module": module, "arguments": list(arguments)}
            request = json.dumps(wish).encode() + b"\n"
            answer = self._answers[number] = asyncio.get_running_loop().create_future()
            try:
                socket.send_fds(self._connection, [request], [log_fd, lifeline_fd])
                return await asyncio.wait_for(answer, self._answer_timeout_s)
            except (OSError, TimeoutError):
                self._lose()
                raise ForkServerLost from None
            finally:
                del self._answers[number]

    async def close(self) -> None:
        """Returns when the server has ended; its children are told by their lifelines."""
        if not self.is_lost:
            self._connection.shutdown(socket.SHUT_WR)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hung_up.wait(), END_TIMEOUT_S)
            self._lose()
        if self._watch is not None:
            self._watch.cancel()
        with suppress(ChildProcessError):  # where another process has launched it
            await asyncio.to_thread(os.waitpid, self.pid, 0)

    def _on_readable(self) -> None:
        try:
            data = self._connection.recv(LARGEST_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hung_up.set()
            self._lose()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, said: dict[str, Any]) -> None:
        if "started" in said:
            process = self._children[said["started"]] = ForkedProcess(said["started"])
            answer = self._answers.get(said["number"])
            if answer is None or answer.done():
                process.kill()  # whoever wanted it was cancelled
            else:
                answer.set_result(process)
        else:
            self._children.pop(said["ended"]).note_end(said["code"])

    def _lose(self) -> None:
        if self.is_lost:
            return
        asyncio.get_running_loop().remove_reader(self._connection)
        self._connection.close()
        if not self._hung_up.is_set():  # it shall start nothing any more
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ForkServerLost())
        self._watch = asyncio.get_running_loop().create_task(self._watch_orphans())

    async def _watch_orphans(self) -> None:
        """Nobody says any more when they end."""
        while self._children:
            for pid, process in list(self._children.items()):
                if not process.can_be_seen():
                    del self._children[pid]
                    process.note_end(UNKNOWN_CODE)
            await asyncio.sleep(POLL_S)
