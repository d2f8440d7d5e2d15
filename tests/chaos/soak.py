"""`python -m tests.chaos.soak`: all kinds of clients for a long time, while parts die.

At the end every request has ended in exactly one way, here as in the gateway's own count, all KV
blocks are free, and no process holds more than before.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from core.errors import PenstockError
from services.cli.console import say
from services.common.channels import open_channel
from tests.chaos.faults import Fault, find_faults
from tests.chaos.footprint import excesses, footprints
from tests.chaos.mesh import ChaosMesh, Shape
from tests.support.metrics import scrape
from tests.support.models import TinyModel, write_servable

NUM_CLIENTS = 12
# Load before the baseline is taken: what is allocated once is allocated then.
WARM_UP_S = 5.0
# From one fault to the next.
FAULT_GAP_S = 8.0
# For buffers and connections of clients that have gone.
REST_S = 3.0
REQUEST_TIMEOUT_S = 120.0
_ENDED = "penstock_requests_ended_total"  # as Prometheus has names.REQUESTS_ENDED


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of client, how many of a hundred are of it, and how its requests may end."""

    name: str
    share: int
    endings: frozenset[str]


ANSWERED, CANCELLED = "answered", "CANCELLED"
KINDS = (
    Kind(name="patient", share=58, endings=frozenset({ANSWERED})),
    Kind(name="cancelling", share=12, endings=frozenset({ANSWERED, CANCELLED})),
    Kind(name="vanishing", share=8, endings=frozenset({ANSWERED, CANCELLED})),
    Kind(name="hurried", share=8, endings=frozenset({ANSWERED, "DEADLINE_EXCEEDED"})),
    Kind(name="wrong", share=8, endings=frozenset({"INVALID_ARGUMENT"})),
    # Several in one call, of which one is cancelled.
    Kind(name="batching", share=6, endings=frozenset({ANSWERED, CANCELLED})),
)


@dataclass(kw_only=True)
class Report:
    """What a soak found."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and ending
    faults: Counter[str] = field(default_factory=Counter)
    # Ended by their client's deadline before anything came: the gateway need not have seen them.
    num_unheard: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return sum(self.endings.values())


class Soak:
    """One soak of one mesh, which has one gateway that outlives it."""

    def __init__(self, mesh: ChaosMesh, *, vocab_size: int, faults: Sequence[Fault]) -> None:
        self._mesh = mesh
        self._vocab_size = vocab_size
        self._faults = faults
        self._rng = random.Random(mesh.shape.seed)
        self._report = Report()
        self._address = mesh.wires[mesh.gateway_names[0]].address

    async def run(self, *, seconds: float) -> Report:
        """Warms up, takes the baseline, and then lets faults come."""
        await self._load(WARM_UP_S)
        await self._rest()
        baselines = footprints(self._mesh)
        doing_harm = asyncio.create_task(self._do_harm(seconds))
        await self._load(seconds)
        await doing_harm
        await self._rest()
        self._report.problems += [*excesses(self._mesh, baselines), *self._wrong_counts()]
        return self._report

    async def _rest(self) -> None:
        await self._mesh.wait_until_idle(timeout_s=60.0)
        await asyncio.sleep(REST_S)

    async def _load(self, seconds: float) -> None:
        until_s = asyncio.get_running_loop().time() + seconds
        async with open_channel(self._address) as channel, asyncio.TaskGroup() as clients:
            for _ in range(NUM_CLIENTS):
                rng = random.Random(self._rng.getrandbits(64))
                clients.create_task(self._be_client(rng, channel, until_s))

    async def _be_client(
        self, rng: random.Random, channel: grpc.aio.Channel, until_s: float
    ) -> None:
        shares = [kind.share for kind in KINDS]
        while asyncio.get_running_loop().time() < until_s:
            [kind] = rng.choices(KINDS, weights=shares)
            if kind.name == "vanishing":
                async with open_channel(self._address) as own:
                    endings = [await self._ask(rng, own, kind)]
            elif kind.name == "batching":
                endings = await self._ask_many(rng, channel)
            else:
                endings = [await self._ask(rng, channel, kind)]
            for ending in endings:
                self._report.endings[kind.name, ending] += 1
                if ending not in kind.endings:
                    self._report.problems.append(f"a {kind.name} client got {ending}")

    async def _ask(self, rng: random.Random, channel: grpc.aio.Channel, kind: Kind) -> str:
        """Sends one request, treats it as its kind does, and says how it ended."""
        request = self._make_request(rng, is_wrong=kind.name == "wrong")
        timeout_s = rng.uniform(0.2, 1.0) if kind.name == "hurried" else REQUEST_TIMEOUT_S
        call = GenerationServiceStub(channel).Generate(request, timeout=timeout_s)
        leaves = kind.name in ("cancelling", "vanishing")
        num_messages = rng.randint(1, 20) if leaves else None
        tokens: list[int] = []
        try:
            async for response in call:
                tokens += response.token_ids
                num_messages = None if num_messages is None else num_messages - 1
                if num_messages == 0:
                    if kind.name == "vanishing":
                        await channel.close()
                    call.cancel()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            code = await call.code()
            is_late = code is grpc.StatusCode.DEADLINE_EXCEEDED
            self._report.num_unheard += is_late and not tokens
            return str(code.name)
        return _ending_of(request, len(tokens))

    async def _ask_many(self, rng: random.Random, channel: grpc.aio.Channel) -> list[str]:
        """Sends some requests in one call, cancels one that has begun, and says how each ended."""
        requests = [self._make_request(rng, is_wrong=False) for _ in range(rng.randint(2, 8))]
        unwanted: int | None = rng.randrange(len(requests))
        num_tokens = [0] * len(requests)
        endings = ["no end"] * len(requests)
        call = GenerationServiceStub(channel).GenerateMany(timeout=REQUEST_TIMEOUT_S)
        try:
            for number, request in enumerate(requests):
                await call.write(pb.GenerateManyRequest(id=number, request=request))
            async for message in call:
                for answer in message.answers:
                    number, response = answer.id, answer.response
                    if number == unwanted:
                        unwanted = None
                        await call.write(pb.GenerateManyRequest(id=number))
                        await call.done_writing()
                    num_tokens[number] += len(response.token_ids)
                    if answer.HasField("error"):
                        endings[number] = answer.error.message
                    elif response.finish_reason == pb.FINISH_REASON_CANCELLED:
                        endings[number] = CANCELLED
                    elif response.finish_reason:
                        endings[number] = _ending_of(requests[number], num_tokens[number])
        except grpc.aio.AioRpcError as error:
            return [error.code().name] * len(requests)
        return endings

    def _make_request(self, rng: random.Random, *, is_wrong: bool) -> pb.GenerateRequest:
        length = min(int(rng.lognormvariate(3.0, 1.0)) + 1, 200)
        request = pb.GenerateRequest(
            token_ids=[rng.randrange(self._vocab_size) for _ in range(length)]
        )
        request.sampling.max_tokens = min(int(rng.lognormvariate(3.3, 1.0)) + 1, 250)
        request.sampling.temperature = rng.choice((0.0, 0.8))
        request.sampling.ignore_eos = True
        if is_wrong:
            request.sampling.temperature = -1.0
        return request

    async def _do_harm(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + seconds - FAULT_GAP_S
        while self._faults and loop.time() + FAULT_GAP_S / 2 < until_s:
            await asyncio.sleep(FAULT_GAP_S / 2)
            fault = self._rng.choice(self._faults)
            part = fault.choose_part(self._mesh, self._rng)
            say(f"{fault.name} ({part})")
            self._report.faults[fault.name] += 1
            try:
                await fault.deed(self._mesh, part)
            except* (grpc.aio.AioRpcError, PenstockError) as refused:
                # An update or a move, though nothing else was done to the mesh.
                why = "; ".join(str(error) for error in refused.exceptions)
                self._report.problems.append(f"{fault.name} ({part}): {why}")
            await asyncio.sleep(FAULT_GAP_S / 2)

    def _wrong_counts(self) -> list[str]:
        """Where the gateway's own count differs from that of its clients."""
        samples = scrape(self._mesh.metrics_ports[self._mesh.gateway_names[0]])
        counted = sum(value for _, value in samples.by_name[_ENDED])
        sent, unheard = self._report.num_requests, self._report.num_unheard
        if sent - unheard <= counted <= sent:
            return []
        return [
            f"{sent} requests were sent, the deadlines of {unheard} passed before anything came, "
            f"and the gateway ended {counted:.0f}"
        ]


def _ending_of(request: pb.GenerateRequest, num_tokens: int) -> str:
    """Of an answer that came to its end by itself."""
    return ANSWERED if num_tokens == request.sampling.max_tokens else "cut short"


async def soak(shape: Shape, *, vocab_size: int, seconds: float, folder: Path) -> Report:
    """A mesh of its own for a soak."""
    # A gateway's death would take its count with it.
    faults = [fault for fault in find_faults("") if not fault.ends_streams]
    async with ChaosMesh(shape, folder=folder) as mesh:
        return await Soak(mesh, vocab_size=vocab_size, faults=faults).run(seconds=seconds)


def main(
    minutes: Annotated[float, typer.Option(envvar="PENSTOCK_MINUTES", help="How long.")] = 30.0,
    seed: Annotated[int, typer.Option(envvar="PENSTOCK_SEED", help="Of everything.")] = 1,
) -> None:
    """Soaks a mesh of a tiny model, two replicas of each of two stages."""
    with tempfile.TemporaryDirectory(prefix="penstock-soak-") as name:
        model = TinyModel()
        shape = Shape(models=(write_servable(Path(name), model),), num_replicas=2, seed=seed)
        report = asyncio.run(
            soak(shape, vocab_size=model.vocab_size, seconds=60 * minutes, folder=Path(name))
        )
    for (kind, ending), count in sorted(report.endings.items()):
        say(f"{count:7} of {kind} clients: {ending}")
    for fault, count in sorted(report.faults.items()):
        say(f"{count:7} times: {fault}")
    for problem in report.problems:
        say(f"problem: {problem}")
    say(f"{report.num_requests} requests, {len(report.problems)} problems")
    if report.problems:
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
