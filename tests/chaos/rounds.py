"""Rounds: streams run, one thing goes wrong, and every answer must be what it always is."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType

import grpc
from penstock.v1 import generation_pb2 as pb

from services.common.channels import open_channel
from tests.chaos.faults import Fault
from tests.chaos.mesh import ChaosMesh
from tests.chaos.streams import Outcome, follow

# Streams of a round start one after the other, so that a fault meets them at all ages.
_START_GAP_S = 0.01
_POLL_S = 0.05
_RECOVERY_TIMEOUT_S = 60.0
# What a client does when its gateway has gone.
_TRIES, _RETRY_S = 40, 0.25


@dataclass(frozen=True, kw_only=True)
class Round:
    """What came of one fault."""

    fault: str
    part: str
    seed: int
    num_streams: int
    lost: tuple[str, ...]  # why, of each stream without an answer
    changed: tuple[int, ...]  # numbers of the streams whose answers differ
    pauses_s: tuple[float, ...]  # the longest of each stream that was open at the fault
    recovery_s: float | None  # from the end of the fault to a whole mesh; None: it stayed broken


class Rounds:
    """Runs rounds on one mesh, against the answers of an undisturbed run of the same streams."""

    def __init__(self, mesh: ChaosMesh, streams: Sequence[pb.GenerateRequest]) -> None:
        self._mesh = mesh
        self._streams = streams
        self._undisturbed: list[Outcome] = []
        self._stack = AsyncExitStack()
        self._channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Rounds:
        for name in self._mesh.gateway_names:
            channel = open_channel(self._mesh.wires[name].address)
            self._channels.append(await self._stack.enter_async_context(channel))
        self._undisturbed = await self._run_streams(_Trigger(0))
        errors = [outcome.error for outcome in self._undisturbed if outcome.error is not None]
        assert not errors, f"an undisturbed mesh failed: {errors}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def run(self, fault: Fault | None, *, seed: int) -> Round:
        """One round; None: nothing goes wrong. The mesh is idle when this returns."""
        rng = random.Random(f"round {seed}")
        part = fault.choose_part(self._mesh, rng) if fault is not None else ""
        num_tokens = sum(len(outcome.token_ids) for outcome in self._undisturbed)
        trigger = _Trigger(rng.randrange(num_tokens * 9 // 10))
        running = asyncio.create_task(self._run_streams(trigger))
        await trigger.reached.wait()
        began_s = time.monotonic()
        if fault is not None:
            await fault.deed(self._mesh, part)
        recovery_s = await self._recover(running)
        outcomes = await running
        if fault is not None and fault.ends_streams:
            outcomes = await self._repeat(outcomes)
        if recovery_s is not None:
            await self._mesh.wait_until_idle()
        return Round(
            fault=fault.name if fault is not None else "none",
            part=part,
            seed=seed,
            num_streams=len(self._streams),
            lost=tuple(one.error.name for one in outcomes if one.error is not None),
            changed=self._changed(outcomes),
            pauses_s=_pauses_s(outcomes, began_s),
            recovery_s=recovery_s,
        )

    async def _run_streams(self, trigger: _Trigger) -> list[Outcome]:
        tasks = []
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(self._streams):
                channel = self._channels[index % len(self._channels)]
                work = follow(channel, request, on_tokens=trigger.count)
                tasks.append(group.create_task(work))
                await asyncio.sleep(_START_GAP_S)
        trigger.reached.set()
        return [task.result() for task in tasks]

    async def _repeat(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Sends what a gateway took with it again, as its clients would."""
        return list(
            await asyncio.gather(
                *(self._repeat_one(index, outcome) for index, outcome in enumerate(outcomes))
            )
        )

    async def _repeat_one(self, index: int, outcome: Outcome) -> Outcome:
        channel = self._channels[index % len(self._channels)]
        for _ in range(_TRIES):
            if outcome.error is not grpc.StatusCode.UNAVAILABLE:
                break
            await asyncio.sleep(_RETRY_S)
            outcome = await follow(channel, self._streams[index])
        return outcome

    async def _recover(self, running: asyncio.Task[list[Outcome]]) -> float | None:
        """How long, from now, the mesh was not whole; None when it stays so."""
        over_s = whole_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if not await self._mesh.is_whole():
                whole_s = now_s + _POLL_S
            elif running.done():
                return whole_s - over_s
            if running.done() and now_s > over_s + _RECOVERY_TIMEOUT_S:
                return None
            await asyncio.sleep(_POLL_S)

    def _changed(self, outcomes: Sequence[Outcome]) -> tuple[int, ...]:
        """A stream that failed is lost, and changed too where it had begun otherwise."""
        pairs = enumerate(zip(outcomes, self._undisturbed, strict=True))
        return tuple(index for index, (one, usual) in pairs if not one.agrees_with(usual))


class _Trigger:
    """Notes when the streams have so many tokens together."""

    def __init__(self, num_tokens: int) -> None:
        self.reached = asyncio.Event()
        self._left = num_tokens

    def count(self, num_tokens: int) -> None:
        self._left -= num_tokens
        if self._left < 0:
            self.reached.set()


def _pauses_s(outcomes: Sequence[Outcome], since_s: float) -> tuple[float, ...]:
    pauses = (outcome.longest_pause_s(since_s) for outcome in outcomes)
    return tuple(pause for pause in pauses if pause is not None)
