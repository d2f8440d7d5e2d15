"""Fuzzes one RPC of running servers and judges what comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import grpc
import psutil

from tests.chaos.footprint import Footprint
from tests.fuzz.rpc.activations import ACTIVATE, ActivateCaller
from tests.fuzz.rpc.calls import CLIENTS_OWN, NOT_AT_DEADLINE, Outcome, call
from tests.fuzz.rpc.hostile import serialise
from tests.fuzz.rpc.methods import METHODS, RpcMethod
from tests.fuzz.rpc.servers import STAGE_CALLED, Servers
from tests.fuzz.running import Finding, FuzzResult

# Calls between two looks at the servers.
BATCH = 500
MOST_FINDINGS = 20
_OUR_FAULT = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_TURNED_AWAY = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
_GIVEN_AWAY = ("Traceback", 'File "', ".py", "site-packages", "AssertionError")

Messages = Sequence[bytes]


def fuzz_rpc(
    servers: Servers,
    name: str,
    *,
    executions: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> FuzzResult:
    """Sends that many sequences; equal seeds draw equal ones. `on_progress` hears of each batch."""
    trial = _Trial(servers, METHODS[name], seed=seed)
    started_s = time.monotonic()
    for first in range(0, executions, BATCH):
        count = min(BATCH, executions - first)
        trial.run_batch(range(first, first + count))
        on_progress(count)
        if trial.is_over:
            break
    return trial.result(seconds=time.monotonic() - started_s)


class _Trial:
    def __init__(self, servers: Servers, method: RpcMethod, *, seed: int) -> None:
        self._servers = servers
        # What must be refused is waited for, however long a busy server takes to say so.
        refused = servers.must_end_with is not None
        self._method = replace(method, may_wait=False, deadline_s=0.0) if refused else method
        self._seed = seed
        self._random = Random(f"metadata {seed}")
        self._num_tried = 0
        self._slowest_s = 0.0
        self._findings: dict[str, Finding] = {}
        self._baselines: list[Footprint] = []
        self._num_logged = len(servers.errors_logged())
        self.is_over = False

    def run_batch(self, numbers: range) -> None:
        """Sends a batch, then looks at the servers."""
        batch = [self._draw(number) for number in numbers]
        for messages, outcome in zip(batch, asyncio.run(self._send(batch)), strict=True):
            self._judge(messages, outcome)
        self._num_tried += len(batch)
        complaints = self._servers.complaints(self._method.server)
        for complaint in complaints:
            self._note(f"after calls {numbers.start} to {numbers.stop - 1}: {complaint}", [])
        self._note_logs()
        now = [_footprint(one.process) for one in self._alive()]
        if not self._baselines:
            self._baselines = now
        self.is_over = bool(complaints) or len(self._findings) >= MOST_FINDINGS

    def result(self, *, seconds: float) -> FuzzResult:
        growth = 0
        for one, before in zip(self._alive(), self._baselines, strict=False):
            now = _footprint(one.process)
            growth = max(growth, now.memory_bytes - before.memory_bytes)
            for excess in now.excess_over(before):
                self._note(f"{one.name} has grown: {excess}", [])
        return FuzzResult(
            target=self._method.name,
            executions=self._num_tried,
            seconds=seconds,
            findings=tuple(self._findings.values()),
            slowest_input_s=self._slowest_s,
            largest_allocation_bytes=growth,
            edges=0,
        )

    def _draw(self, number: int) -> list[bytes]:
        random = Random(f"{self._method.name} {self._seed} {number}")
        right = self._method.sequences(random, self._servers.world)
        return serialise(right, random)

    async def _send(self, batch: Sequence[Messages]) -> list[Outcome]:
        if self._method.name == ACTIVATE and self._servers.must_end_with is None:
            return await self._send_activations(batch)
        places = asyncio.Semaphore(self._method.num_at_once)
        async with self._servers.open_channel(self._method) as channel:

            async def send(messages: Messages) -> Outcome:
                metadata = self._servers.metadata(self._random)
                async with places:
                    return await call(channel, self._method, messages, metadata=metadata)

            return list(await asyncio.gather(*map(send, batch)))

    async def _send_activations(self, batch: Sequence[Messages]) -> list[Outcome]:
        async with (
            self._servers.open_channel(self._method) as channel,
            self._servers.control_of(STAGE_CALLED[ACTIVATE]) as control,
        ):
            caller = ActivateCaller(channel, control)
            await caller.open_stage()
            return [await caller.call(self._method, messages) for messages in batch]

    def _judge(self, messages: Messages, outcome: Outcome) -> None:
        self._slowest_s = max(self._slowest_s, outcome.seconds)
        wanted = self._servers.must_end_with
        if wanted not in (None, outcome.code) and outcome.details != CLIENTS_OWN:
            ended = "waits" if outcome.code is None else f"{outcome.code.name}: {outcome.details}"
            self._note(f"not {wanted}, but {ended[:300]}", messages)
        if wanted is None and outcome.code in _TURNED_AWAY:
            self._note(f"who may call is turned away: {outcome.details[:300]}", messages)
        if outcome.code in _OUR_FAULT and outcome.details != CLIENTS_OWN:
            self._note(f"{outcome.code.name}: {outcome.details[:300]}", messages)
        if outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED and not self._may_last(outcome):
            self._note(f"no end after {outcome.seconds:.0f} s", messages)
        if any(word in outcome.details for word in _GIVEN_AWAY):
            self._note(f"the status shows our insides: {outcome.details[:300]}", messages)

    def _may_last(self, outcome: Outcome) -> bool:
        """Whether the deadline ended what waits for what may never come, and did end it. A stream
        that goes on for as long as its client likes is left by the client, once it is silent."""
        return self._method.deadline_s > 0 and outcome.details != NOT_AT_DEADLINE

    def _note_logs(self) -> None:
        logged = self._servers.errors_logged()
        for line in logged[self._num_logged :]:
            self._note(f"logged: {line}", [])
        self._num_logged = len(logged)

    def _alive(self) -> list:
        return [
            one for one in self._servers.processes(self._method.server) if one.process.is_running()
        ]

    def _note(self, what: str, messages: Messages) -> None:
        if len(self._findings) < MOST_FINDINGS:
            self._findings.setdefault(what[:60], Finding(what=what, input=b"\n--\n".join(messages)))


def _footprint(process: psutil.Process) -> Footprint:
    with process.oneshot():
        return Footprint(
            memory_bytes=process.memory_info().rss,
            threads=process.num_threads(),
            descriptors=process.num_fds(),
        )
