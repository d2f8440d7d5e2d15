"""`python -m tests.benchmarks.hops`: what certificates cost a message from stage to stage.

A frame goes to a process of its own over an Activate stream, and a credit comes back: over plain
loopback and over mTLS in turn, round after round, so that what else the machine does meets both
alike. Whole meshes: `make bench CERTS=auto SHORTCUTS=0` against the same without CERTS.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from penstock.v1 import stage_pb2, stage_pb2_grpc, tensor_pb2
from rich.table import Table

from services.cli.console import out as console
from services.common.channels import open_channel
from services.common.credentials import Credentials
from tests.support.certificates import credentials, write_mesh
from tests.support.local_mesh import ROOT

WARM_UP = 200
PLAIN, SECURE = "plain", "mTLS"


def main(
    sizes: Annotated[str, typer.Option(help="Bytes of a frame.")] = "1024 65536",
    round_trips: Annotated[int, typer.Option(help="Of each size and kind, in a round.")] = 1000,
    rounds: Annotated[int, typer.Option(help="How often the two take turns.")] = 5,
) -> None:
    """Measures and prints a table."""
    table = Table("bytes", "kind", "median us", "p99 us", "CPU us, this side", box=None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        certs = Path(folder)
        write_mesh(certs, "stage/0", "stage/1")
        ports = {
            PLAIN: stack.enter_context(_echoing_stage()),
            SECURE: stack.enter_context(_echoing_stage(str(certs / "stage-1"))),
        }
        own = {PLAIN: None, SECURE: credentials(certs, "stage/0")}
        for size in map(int, sizes.split()):
            for kind, trips in asyncio.run(_take_turns(ports, own, size, round_trips, rounds)):
                table.add_row(f"{size:,}", kind, *trips)
    console.print(table)


async def _take_turns(
    ports: dict[str, int],
    own: dict[str, Credentials | None],
    size: int,
    round_trips: int,
    rounds: int,
) -> list[tuple[str, Sequence[str]]]:
    """Of each kind, the cells of its row."""
    times: dict[str, list[float]] = {kind: [] for kind in ports}
    cpu_s = dict.fromkeys(ports, 0.0)
    async with _streams(ports, own) as calls:
        for call in calls.values():
            await _round(call, size, WARM_UP)
        for _ in range(rounds):
            for kind, call in calls.items():
                began_s = time.process_time()
                times[kind] += await _round(call, size, round_trips)
                cpu_s[kind] += time.process_time() - began_s
    return [
        (kind, _cells(times[kind], cpu_s=cpu_s[kind] / (round_trips * rounds))) for kind in ports
    ]


def _cells(times_s: list[float], *, cpu_s: float) -> Sequence[str]:
    p99_s = statistics.quantiles(times_s, n=100)[98]
    return [f"{1e6 * value:.0f}" for value in (statistics.median(times_s), p99_s, cpu_s)]


@asynccontextmanager
async def _streams(
    ports: dict[str, int], own: dict[str, Credentials | None]
) -> AsyncIterator[dict[str, Any]]:
    """An open Activate stream of each kind."""
    async with AsyncExitStack() as stack:
        calls = {}
        for kind, port in ports.items():
            dialled = open_channel(f"127.0.0.1:{port}", credentials=own[kind], role="stage/1")
            channel = await stack.enter_async_context(dialled)
            stub: Any = stage_pb2_grpc.StageServiceStub(channel)
            calls[kind] = stub.Activate()
            stack.callback(calls[kind].cancel)
        yield calls


async def _round(call: Any, size: int, round_trips: int) -> list[float]:
    """The seconds of each round trip."""
    request = stage_pb2.ActivateRequest(frame=tensor_pb2.ActivationFrame(data=bytes(size)))
    times_s = []
    for _ in range(round_trips):
        began_s = time.perf_counter()
        await call.write(request)
        await call.read()
        times_s.append(time.perf_counter() - began_s)
    return times_s


@contextmanager
def _echoing_stage(*arguments: str) -> Iterator[int]:
    """The port of a process that ends with this block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.echoing_stage", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


if __name__ == "__main__":
    typer.run(main)
