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
    # From its beginning until it showed in the health of the part; None: it never did.
    red_s: float | None
    # From its end until the mesh is whole, and each stream has gone on; None: it stayed broken.
    recovery_s: float | None


class Rounds:
    """Runs rounds on one mesh, against the answers of an undisturbed run of the same streams."""

    def __init__(self, mesh: ChaosMesh, streams: Sequence[pb.GenerateRequest]) -> None:
        self._mesh = mesh
        self._streams = streams
        # Answers without faults, by the versions of the stages' weights.
        self._usual: dict[tuple[int, ...], list[Outcome]] = {}
        self._stack = AsyncExitStack()
        self._channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Rounds:
        for name in self._mesh.gateway_names:
            channel = open_channel(self._mesh.wires[name].address)
            self._channels.append(await self._stack.enter_async_context(channel))
        await self._find_usual()
        return self

    async def _find_usual(self) -> list[Outcome]:
        """What the streams bring on the mesh as it is."""
        versions = self._mesh.versions
        if versions not in self._usual:
            runs = await self._run_streams(_Trigger(0), _is_over())
            self._usual[versions] = [outcome for [outcome] in runs]
            errors = [outcome.error for outcome in self._usual[versions] if outcome.error]
            assert not errors, f"an undisturbed mesh failed: {errors}"
        return self._usual[versions]

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
        usual = await self._find_usual()
        num_tokens = sum(len(outcome.token_ids) for outcome in usual)
        trigger = _Trigger(rng.randrange(num_tokens * 9 // 10))
        is_over = asyncio.Event() if fault is not None and fault.repeats_streams else _is_over()
        running = asyncio.create_task(self._run_streams(trigger, is_over))
        await trigger.reached.wait()
        began_s = time.monotonic()
        watching = asyncio.create_task(self._watch(part))
        if fault is not None:
            await fault.deed(self._mesh, part)
        is_over.set()
        over_s = time.monotonic()
        whole_s = await self._wait_until_whole(running)
        red_s = await _end(watching)
        runs = await running
        outcomes = [outcome for run in runs for outcome in run]
        resumed_s = max((outcome.resumed_s(began_s) for outcome in outcomes), default=0.0)
        if fault is not None and fault.ends_streams:
            outcomes = await self._repeat(outcomes)
        answers = [usual]
        if whole_s is not None:
            await self._mesh.wait_until_idle()
            answers.append(await self._find_usual())
        references = [
            [one for one, run in zip(answer, runs, strict=True) for _ in run] for answer in answers
        ]
        return Round(
            fault=fault.name if fault is not None else "none",
            part=part,
            seed=seed,
            num_streams=len(outcomes),
            lost=tuple(one.error.name for one in outcomes if one.error is not None),
            changed=_changed(outcomes, references),
            pauses_s=_pauses_s(outcomes, began_s),
            red_s=None if red_s is None else red_s - began_s,
            recovery_s=None if whole_s is None else max(whole_s, resumed_s, over_s) - over_s,
        )

    async def _watch(self, part: str) -> float:
        """When it is first seen that something is wrong with the part."""
        while not await self._mesh.is_red(part):  # noqa: ASYNC110 (nothing announces it)
            await asyncio.sleep(_POLL_S)
        return time.monotonic()

    async def _run_streams(self, trigger: _Trigger, is_over: asyncio.Event) -> list[list[Outcome]]:
        """What came of each stream; one that has ended is sent again until it is over."""

        async def keep_asking(
            channel: grpc.aio.Channel, request: pb.GenerateRequest
        ) -> list[Outcome]:
            outcomes = [await follow(channel, request, on_tokens=trigger.count)]
            while not is_over.is_set() and outcomes[-1].error is None:
                outcomes.append(await follow(channel, request))
            return outcomes

        tasks = []
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(self._streams):
                channel = self._channels[index % len(self._channels)]
                tasks.append(group.create_task(keep_asking(channel, request)))
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

    async def _wait_until_whole(self, running: asyncio.Task[list[Outcome]]) -> float | None:
        """Since when the mesh is whole, once all streams have ended; None when it stays broken."""
        over_s = whole_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if not await self._mesh.is_whole():
                whole_s = now_s + _POLL_S
            elif running.done():
                return whole_s
            if running.done() and now_s > over_s + _RECOVERY_TIMEOUT_S:
                return None
            await asyncio.sleep(_POLL_S)


class _Trigger:
    """Notes when the streams have so many tokens together."""

    def __init__(self, num_tokens: int) -> None:
        self.reached = asyncio.Event()
        self._left = num_tokens

    def count(self, num_tokens: int) -> None:
        self._left -= num_tokens
        if self._left < 0:
            self.reached.set()


def _is_over() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _changed(
    outcomes: Sequence[Outcome], references: Sequence[Sequence[Outcome]]
) -> tuple[int, ...]:
    """Numbers of those that are like none of the answers that may be. A stream that failed is lost,
    and changed too where it had begun otherwise."""
    return tuple(
        index
        for index, (one, *usual) in enumerate(zip(outcomes, *references, strict=True))
        if not any(map(one.agrees_with, usual))
    )


async def _end(watching: asyncio.Task[float]) -> float | None:
    """What it has found; None: nothing."""
    watching.cancel()
    [found] = await asyncio.gather(watching, return_exceptions=True)
    if isinstance(found, Exception):
        raise found
    return found if isinstance(found, float) else None


def _pauses_s(outcomes: Sequence[Outcome], since_s: float) -> tuple[float, ...]:
    pauses = (outcome.longest_pause_s(since_s) for outcome in outcomes)
    return tuple(pause for pause in pauses if pause is not None)
