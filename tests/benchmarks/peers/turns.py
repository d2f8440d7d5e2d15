"""One system's turn: it is started, does its waves, and is ended with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import grpc
import psutil
import uvloop

from services.common.channels import open_channel
from tests.benchmarks.load import LoadGenerator, Request, answers_of, encode_grpc
from tests.benchmarks.meters import ProcessReading, peak_memory_bytes, read_processes
from tests.benchmarks.peers.work import Wave
from tests.benchmarks.report import Figures, make_figures
from tests.benchmarks.systems import System, started_mesh

LOAD_TIMEOUT_S = 420.0
WAVE_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0


class PeerFailed(Exception):
    """A system could not be started, or broke in its turn; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What one wave took. `figures` is what a mesh of ours shows of itself."""

    seconds: float
    num_tokens: int
    figures: Figures | None = None


class Turn(Protocol):
    """A system that is up."""

    start_s: float

    def run(self, wave: Wave) -> Done: ...

    def peak_memory(self) -> dict[str, int]:
        """Bytes that were resident at a time, by process."""
        ...


@dataclass(kw_only=True)
class MeshTurn:
    """A mesh of ours, through its public API."""

    system: System
    start_s: float
    channel: grpc.aio.Channel
    runner: asyncio.Runner
    one_call: bool  # for all requests of a wave, not one for each

    def run(self, wave: Wave) -> Done:
        return self.runner.run(self._run(wave))

    def peak_memory(self) -> dict[str, int]:
        return {one.name: one.peak_memory_bytes for one in self._readings()}

    async def _run(self, wave: Wave) -> Done:
        requests = [
            Request(
                message=encode_grpc(prompt, wave.num_new_tokens),
                num_prompt_tokens=len(prompt),
                num_new_tokens=wave.num_new_tokens,
            )
            for prompt in wave.prompts
        ]
        before, from_s = self._readings(), time.monotonic()
        until_s = from_s + WAVE_TIMEOUT_S
        async with answers_of(self.channel, one_call=self.one_call) as answers:
            generator = LoadGenerator(answers)
            await generator.closed_loop([iter([request]) for request in requests], until_s=until_s)
        to_s = time.monotonic()
        tally = generator.tally
        if tally.errors or len(tally.ended_at_s) < len(requests):
            raise PeerFailed((tally.errors or ["a wave did not end in time"])[0])
        figures = make_figures(
            "", tally, from_s=from_s, to_s=to_s, before=before, after=self._readings()
        )
        return Done(
            seconds=max(tally.ended_at_s) - from_s,
            num_tokens=sum(tally.token_counts),
            figures=figures,
        )

    def _readings(self) -> list[ProcessReading]:
        return read_processes(self.system.processes)


@contextmanager
def mesh_turn(options: Sequence[str], *, one_call: bool) -> Iterator[MeshTurn]:
    """Starts a mesh with these options of `penstock mesh`; for `one_call` see MeshTurn."""
    with contextlib.ExitStack() as stack:
        try:
            system = stack.enter_context(started_mesh(options))
        except AssertionError as error:
            raise PeerFailed(str(error).strip().splitlines()[-1]) from error
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        channel = runner.run(_connect(system.address))
        stack.callback(lambda: runner.run(channel.close()))
        yield MeshTurn(
            system=system,
            start_s=system.start_s or 0.0,
            channel=channel,
            runner=runner,
            one_call=one_call,
        )


@dataclass(frozen=True, kw_only=True)
class Child:
    """A program of `children/` in an environment of its own, and what its `load` is given."""

    python: Path
    script: Path
    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


class ChildTurn:
    """A peer in a process of its own, driven through a pipe."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self._peaks: dict[str, int] = {}
        self.start_s = 0.0

    def load(self, options: Mapping[str, Any]) -> None:
        self.start_s = self._ask(dict(options), timeout_s=LOAD_TIMEOUT_S)["seconds"]

    def run(self, wave: Wave) -> Done:
        task = {"prompts": wave.prompts, "num_new_tokens": wave.num_new_tokens}
        answer = self._ask(task, timeout_s=WAVE_TIMEOUT_S)
        return Done(seconds=answer["seconds"], num_tokens=int(answer["num_tokens"]))

    def peak_memory(self) -> dict[str, int]:
        processes = [psutil.Process(self._process.pid), *_children(self._process.pid)]
        return {str(one.pid): peak_memory_bytes(one) for one in processes}

    def _ask(self, line: Mapping[str, Any], *, timeout_s: float) -> dict[str, float]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(line) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(last_line(self._log)) from None
        answer = _read_line(stdout, timeout_s=timeout_s)
        if answer is None:
            raise PeerFailed(f"no answer after {timeout_s:.0f} s")
        if not answer:
            raise PeerFailed(last_line(self._log))
        return json.loads(answer)


@contextmanager
def child_turn(child: Child, *, log: Path) -> Iterator[ChildTurn]:
    """Starts a peer; what it prints goes into `log`."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [child.python, child.script],
            env=dict(child.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        turn = ChildTurn(process, log)
        turn.load(child.options)
        yield turn
    finally:
        end_session(process)


def end_session(process: subprocess.Popen[str]) -> None:
    """Ends a process that leads a session of its own and all that it started; waits for it.

    It ends by itself when its pipe closes; what is left of it after a while is killed.
    """
    family = _children(process.pid)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=END_TIMEOUT_S)


def _children(pid: int) -> list[psutil.Process]:
    """All below a process; none where it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


async def _connect(address: str) -> grpc.aio.Channel:
    channel = open_channel(address)
    await channel.channel_ready()
    return channel


def _read_line(stream: IO[str], *, timeout_s: float) -> str | None:
    """A line, "" at the stream's end, None when nothing came in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            return None
    return stream.readline()


def last_line(log: Path) -> str:
    """What a program said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it ended without a word")
