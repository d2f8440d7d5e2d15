"""`python -m tests.chaos.overload`: three times as many requests arrive as can be served.

What is admitted is answered in time, what is not is refused at once and told when to come again,
deadlines hold, no process grows, and when it is over the mesh is as it was.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.cli.console import say
from services.common.channels import open_channel
from tests.chaos.footprint import excesses, footprints
from tests.chaos.mesh import ChaosMesh, Shape
from tests.support.models import TinyModel, write_servable

NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 16, 64
# Clients that together keep the mesh full, to find what it can serve. All may come in one turn, and
# then all wait.
NUM_SATURATING = 32
SATURATION_S = 3.0
TIMES_SATURATION = 3.0
DEADLINE_S = 5.0
# How late a deadline may be seen by its client; the machine is full.
LATE_S = 2.0
RECOVERY_LIMIT_S = 10.0
MAX_RUNNING, MAX_WAITING = 32, 32


@dataclass(kw_only=True)
class Report:
    """What came of the requests that arrived, and of the mesh."""

    served_per_s: float = 0.0
    endings: Counter[str] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)  # of those admitted
    num_without_retry_delay: int = 0  # refused, and not told when to come again
    latest_deadline_s: float = 0.0  # longest that a request was open
    most_waiting: int = 0
    recovery_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Adds what should not be."""
        admissible = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        for ending in self.endings.keys() - admissible:
            self.problems.append(f"{self.endings[ending]} requests ended with {ending}")
        if not self.endings["OK"]:
            self.problems.append("nothing was served")
        if not self.endings["RESOURCE_EXHAUSTED"]:
            self.problems.append("nothing was refused")
        if self.num_without_retry_delay:
            self.problems.append(f"{self.num_without_retry_delay} refusals without RetryInfo")
        if self.latest_deadline_s > DEADLINE_S + LATE_S:
            self.problems.append(f"a request was open for {self.latest_deadline_s:.1f} s")
        if self.most_waiting > MAX_WAITING:
            self.problems.append(f"{self.most_waiting} requests waited")
        if self.recovery_s > RECOVERY_LIMIT_S:
            self.problems.append(f"the mesh was idle only after {self.recovery_s:.1f} s")


class Overload:
    """One overload of one mesh."""

    def __init__(self, mesh: ChaosMesh, channel: grpc.aio.Channel, *, vocab_size: int) -> None:
        self._mesh = mesh
        self._generate = GenerationServiceStub(channel).Generate
        self._rng = random.Random(mesh.shape.seed)
        self._vocab_size = vocab_size
        self._report = Report()

    async def run(self, *, seconds: float) -> Report:
        """Finds the rate that saturates the mesh, and then overloads it."""
        report = self._report
        report.served_per_s = await self._saturate()
        await self._mesh.wait_until_idle()
        baselines = footprints(self._mesh)
        watching = asyncio.create_task(self._watch_queue())
        await self._arrive(TIMES_SATURATION * report.served_per_s, seconds)
        loop = asyncio.get_running_loop()
        over_s = loop.time()
        await self._mesh.wait_until_idle()
        report.recovery_s = loop.time() - over_s
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        report.problems += excesses(self._mesh, baselines)
        report.judge()
        return report

    async def _saturate(self) -> float:
        """Requests per second with as many at a time as the mesh takes."""
        until_s = asyncio.get_running_loop().time() + SATURATION_S
        counts = await asyncio.gather(*(self._ask_until(until_s) for _ in range(NUM_SATURATING)))
        return sum(counts) / SATURATION_S

    async def _ask_until(self, until_s: float) -> int:
        count = 0
        while asyncio.get_running_loop().time() < until_s:
            async for _ in self._generate(self._make_request(), timeout=60.0):
                pass
            count += 1
        return count

    async def _arrive(self, rate: float, seconds: float) -> None:
        """Requests come at random times, whatever became of those before."""
        loop = asyncio.get_running_loop()
        began_s = due_s = loop.time()
        async with asyncio.TaskGroup() as requests:
            while (due_s := due_s + self._rng.expovariate(rate)) < began_s + seconds:
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                requests.create_task(self._ask())

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        sent_s = loop.time()
        first_token_s = None
        try:
            async for _ in self._generate(self._make_request(), timeout=DEADLINE_S):
                first_token_s = first_token_s or loop.time() - sent_s
            ending = "OK"
        except grpc.aio.AioRpcError as error:
            ending = error.code().name
            if ending == "RESOURCE_EXHAUSTED" and not _has_retry_delay(error):
                self._report.num_without_retry_delay += 1
        self._report.endings[ending] += 1
        if first_token_s is not None:
            self._report.first_token_s.append(first_token_s)
        latest_s = max(self._report.latest_deadline_s, loop.time() - sent_s)
        self._report.latest_deadline_s = latest_s

    async def _watch_queue(self) -> None:
        while True:
            mesh = await self._mesh.mesh()
            if mesh is not None:
                waiting = max(self._report.most_waiting, mesh.requests_waiting)
                self._report.most_waiting = waiting
            await asyncio.sleep(0.1)

    def _make_request(self) -> pb.GenerateRequest:
        prompt = [self._rng.randrange(self._vocab_size) for _ in range(NUM_PROMPT_TOKENS)]
        request = pb.GenerateRequest(token_ids=prompt)
        request.sampling.max_tokens = NUM_NEW_TOKENS
        request.sampling.ignore_eos = True
        return request


def _has_retry_delay(error: grpc.aio.AioRpcError) -> bool:
    status = rpc_status.from_call(error)
    details = error_details_pb2.RetryInfo.DESCRIPTOR
    return status is not None and any(one.Is(details) for one in status.details)


async def overload(model: Path, *, vocab_size: int, seconds: float, folder: Path) -> Report:
    """A mesh of its own for an overload."""
    shape = Shape(models=(model,), max_sequences=MAX_RUNNING, max_waiting=MAX_WAITING)
    async with (
        ChaosMesh(shape, folder=folder) as mesh,
        open_channel(mesh.wires[mesh.gateway_names[0]].address) as channel,
    ):
        return await Overload(mesh, channel, vocab_size=vocab_size).run(seconds=seconds)


def main(
    seconds: Annotated[float, typer.Option(envvar="PENSTOCK_SECONDS", help="How long.")] = 120.0,
) -> None:
    """Overloads a mesh of a tiny model."""
    with tempfile.TemporaryDirectory(prefix="penstock-overload-") as name:
        tiny = TinyModel()
        model = write_servable(Path(name), tiny)
        report = asyncio.run(
            overload(model, vocab_size=tiny.vocab_size, seconds=seconds, folder=Path(name))
        )
    first_s = sorted(report.first_token_s)
    say(f"saturated at {report.served_per_s:.0f} requests/s, of {NUM_NEW_TOKENS} tokens")
    for ending, count in report.endings.most_common():
        say(f"{count:7} {ending}")
    if first_s:
        say(f"time to first token: p50 {_at(first_s, 0.5):.2f} s, p99 {_at(first_s, 0.99):.2f} s")
    say(f"at most {report.most_waiting} waited; idle {report.recovery_s:.2f} s after the last")
    for problem in report.problems:
        say(f"problem: {problem}")
    if report.problems:
        raise typer.Exit(code=1)


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


if __name__ == "__main__":
    typer.run(main)
