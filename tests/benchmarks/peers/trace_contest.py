"""A real trace against servers: latencies at a share of what each can take, and at the same rate.

Each server is saturated first; then the trace's first requests arrive as in the trace, at 80 % of
its own rate, and at 80 % of the lower of the two, so that both are seen under the same load as
well. They are the same requests each time: a tail is made by the longest prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from rich.box import MARKDOWN
from rich.table import Table

from services.common.channels import open_channel
from tests.benchmarks.load import grpc_answers
from tests.benchmarks.measurements import OPEN_LOOP_SHARE, Bench, mesh_bench, traced_requests
from tests.benchmarks.peers.goals import Outcome
from tests.benchmarks.peers.openai import encode_openai, open_client, openai_answers
from tests.benchmarks.peers.turns import LOAD_TIMEOUT_S, PeerFailed, end_session, last_line
from tests.benchmarks.report import Figures
from tests.benchmarks.systems import System, started_mesh

POLL_S = 0.5
ARRIVALS = 60
Server = Callable[[], AbstractAsyncContextManager[Bench]]


@dataclass(kw_only=True)
class Contest:
    """What was seen of both servers, by name. `share_clipped` is of the trace's requests."""

    ours: str
    theirs: str
    share_clipped: float = 0.0
    saturated: dict[str, Figures] = field(default_factory=dict)
    at_own_rate: dict[str, Figures] = field(default_factory=dict)
    at_lower_rate: dict[str, Figures] = field(default_factory=dict)

    def outcomes(self) -> list[Outcome]:
        """Ours shall have the shorter tails, at both rates."""
        rows = []
        for rate, servers in (("own", self.at_own_rate), ("the lower", self.at_lower_rate)):
            for measure, name in (("TTFT", "ttft_p99_ms"), ("inter-token", "inter_token_p99_ms")):
                mine, other = getattr(servers[self.ours], name), getattr(servers[self.theirs], name)
                rows.append(
                    Outcome(
                        measure=f"trace, {measure} p99 at 80 % of {rate} rate",
                        ours=f"{mine:,.0f} ms ({self.ours})",
                        against=f"{other:,.0f} ms ({self.theirs})",
                        ratio=mine / other,
                        goal="< 1 x",
                        met=mine < other,
                    )
                )
        return rows


def lower_rate(saturated: dict[str, Figures]) -> float:
    """Requests/s that every server should be able to take."""
    return OPEN_LOOP_SHARE * min(request_rate(figures) for figures in saturated.values())


def request_rate(figures: Figures) -> float:
    """Requests/s that were answered to their end."""
    return figures.requests / figures.duration_s


async def contest(
    servers: Mapping[str, Server],
    *,
    ours: str,
    theirs: str,
    seconds: float,
    say: Callable[[str], None],
) -> Contest:
    """Lets each server in turn serve the trace; for `seconds` it is saturated.

    The slower one's rate is known after the first turns only, so the faster one gets another
    turn at it where it has come first.
    """
    result = Contest(ours=ours, theirs=theirs)
    for name, server in servers.items():
        async with server() as bench:
            await _own_rate(name, bench, result, seconds=seconds, say=say)
            if len(result.saturated) == len(servers):
                await _lower_rate(name, bench, result)
    for name, server in servers.items():
        if name not in result.at_lower_rate:
            async with server() as bench:
                await _lower_rate(name, bench, result)
    return result


async def _own_rate(
    name: str, bench: Bench, result: Contest, *, seconds: float, say: Callable[[str], None]
) -> None:
    traced, result.share_clipped = traced_requests(bench.context_length)
    figures = await bench.saturated(traced, seconds)
    _require_answers(name, figures)
    result.saturated[name] = figures
    rate = OPEN_LOOP_SHARE * request_rate(figures)
    say(
        f"  {name}: saturated at {request_rate(figures):.2f} requests/s; now {rate:.2f}, "
        f"{ARRIVALS / rate / 60:.0f} minutes"
    )
    result.at_own_rate[name] = await bench.arriving(traced[:ARRIVALS], requests_per_s=rate)


async def _lower_rate(name: str, bench: Bench, result: Contest) -> None:
    rate = lower_rate(result.saturated)
    if rate == OPEN_LOOP_SHARE * request_rate(result.saturated[name]):
        result.at_lower_rate[name] = result.at_own_rate[name]
        return
    traced, _ = traced_requests(bench.context_length)
    result.at_lower_rate[name] = await bench.arriving(traced[:ARRIVALS], requests_per_s=rate)


def _require_answers(name: str, figures: Figures) -> None:
    if figures.errors:
        raise PeerFailed(f"{name}: {figures.errors[0]}")
    if not figures.requests:
        raise PeerFailed(f"{name}: no request of the trace ended in time; give more SECONDS")


def mesh_server(options: Sequence[str]) -> Server:
    """A mesh of ours."""

    @asynccontextmanager
    async def server() -> AsyncIterator[Bench]:
        with contextlib.ExitStack() as stack:
            try:
                system = stack.enter_context(started_mesh(options))
            except AssertionError as error:
                raise PeerFailed(str(error).strip().splitlines()[-1]) from error
            channel = open_channel(system.address)
            try:
                yield await mesh_bench(system, channel, answers=grpc_answers(channel))
            finally:
                await channel.close()

    return server


@dataclass(frozen=True, kw_only=True)
class ServerCommand:
    """How to start an OpenAI-style server, and what it serves."""

    command: Sequence[str]
    environment: dict[str, str]
    address: str
    model: str
    vocab_size: int
    context_length: int


def openai_server(start: ServerCommand, *, log: Path) -> Server:
    """A server that is started with a command, and ready when its health says so."""

    @asynccontextmanager
    async def server() -> AsyncIterator[Bench]:
        process = _start(start, log)
        try:
            async with open_client(start.address) as client:
                await _until_healthy(client, process, log)
                yield Bench(
                    system=System(name=start.model, address=start.address),
                    answers=openai_answers(client),
                    vocab_size=start.vocab_size,
                    context_length=start.context_length,
                    encode=encode_openai(start.model),
                )
        finally:
            process.terminate()
            end_session(process)

    return server


def _start(start: ServerCommand, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as output:
        return subprocess.Popen(
            start.command,
            env=start.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


async def _until_healthy(
    client: httpx2.AsyncClient, process: subprocess.Popen[str], log: Path
) -> None:
    until_s = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise PeerFailed(f"the server ended: {last_line(log)}")
        with contextlib.suppress(httpx2.HTTPError):
            if (await client.get("/health")).status_code == 200:
                return
        await asyncio.sleep(POLL_S)
    raise PeerFailed(f"the server was not ready after {LOAD_TIMEOUT_S:.0f} s")


def contest_table(result: Contest) -> Table:
    """A row for each server and load."""
    title = f"Azure trace, {result.share_clipped:.1%} of requests clipped to the context"
    table = Table(box=MARKDOWN, title=title, title_justify="left")
    table.add_column("server", no_wrap=True)
    table.add_column("load", no_wrap=True)
    for column in ("requests/s", "tokens/s", "TTFT p50", "p99 ms", "inter-token p50", "p99 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    loads = {
        "saturated": result.saturated,
        "80 % of its own": result.at_own_rate,
        "80 % of the lower": result.at_lower_rate,
    }
    for load, servers in loads.items():
        for name, row in servers.items():
            latencies = (row.ttft_p50_ms, row.ttft_p99_ms, row.inter_token_p50_ms)
            table.add_row(
                name,
                load,
                f"{request_rate(row):.2f}",
                f"{row.tokens_per_s:.0f}",
                *(f"{latency:.0f}" for latency in (*latencies, row.inter_token_p99_ms)),
            )
    return table
