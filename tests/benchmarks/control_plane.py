"""`python -m tests.benchmarks.control_plane`: what coordinator and gateway cost for a token.

Stages are replaced by some that only take time (tests/support/quick_stages.py): 2 ms a
micro-batch and 0.2 ms a row. So the figures depend neither on a model nor on its kernels. The
clients' cost is that of this process.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import grpc.aio
import typer
import uvloop
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.cli.console import out as console
from services.common.channels import open_channel
from services.local.ports import HOST, HeldPorts
from services.local.run_folder import record_process
from tests.benchmarks.load import answers_of
from tests.benchmarks.measurements import Plan, mesh_bench
from tests.benchmarks.report import Figures, latency_table, process_table
from tests.benchmarks.systems import System
from tests.support.local_mesh import ROOT
from tests.support.tiny_tokenizer import write_tiny_tokenizer

READY_TIMEOUT_S = 30.0
NUM_STAGES = 2


def main(
    streams: Annotated[str, typer.Option(help="Numbers of clients.")] = "1 8 64 256",
    seconds: Annotated[float, typer.Option(help="Length of each measurement.")] = 5.0,
    one_call: Annotated[
        bool, typer.Option(help="All requests in one GenerateMany call, not one for each.")
    ] = False,
) -> None:
    """Measures and prints a table."""
    counts = tuple(int(count) for count in streams.split())
    plan = Plan(
        streams=counts, seconds=seconds, requests=None, open_loop_seconds=0.0, one_call=one_call
    )
    with _started() as system:
        figures = uvloop.run(_measured(system, plan))
    console.print(latency_table(figures, number_format="none"))
    console.print(process_table(figures))


@contextmanager
def _started() -> Iterator[System]:
    """A real coordinator and a real gateway before stages that compute nothing."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stages = stack.enter_context(_running("tests.support.quick_stages", str(NUM_STAGES)))
        assert stages.stdout is not None
        addresses = stages.stdout.readline().decode().strip()
        held = stack.enter_context(HeldPorts())
        ports = [held.take() for _ in range(4)]
        inner, outer = f"{HOST}:{ports[0]}", f"{HOST}:{ports[1]}"
        options = ["--listen", inner, "--metrics-port", str(ports[2]), "--log-level", "WARNING"]
        options += ["--stages", addresses]
        coordinator = stack.enter_context(_running("services.coordinator", *options))
        options = ["--listen", outer, "--metrics-port", str(ports[3]), "--log-level", "WARNING"]
        options += ["--coordinator", inner, "--model", str(write_tiny_tokenizer(folder))]
        gateway = stack.enter_context(_running("services.gateway", *options, "--drain-s", "0"))
        parts = {"coordinator": coordinator.pid, "gateway": gateway.pid, "clients": os.getpid()}
        processes = [
            record_process(name, pid, address="", metrics_port=0, log="")
            for name, pid in parts.items()
        ]
        yield System(name="control plane", address=outer, processes=processes)


async def _measured(system: System, plan: Plan) -> list[Figures]:
    async with open_channel(system.address) as channel:
        await _until_ready(channel)
        async with answers_of(channel, one_call=plan.one_call) as answers:
            bench = await mesh_bench(system, channel, answers=answers)
            return [await bench.closed(num_streams, plan) for num_streams in plan.streams]


async def _until_ready(channel: grpc.aio.Channel) -> None:
    stub = GenerationServiceStub(channel)
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            request = pb.ListModelsRequest()
            listed = await stub.ListModels(request, wait_for_ready=True, timeout=READY_TIMEOUT_S)
            if listed.models and listed.models[0].ready:
                return
            await asyncio.sleep(0.05)


@contextmanager
def _running(module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this checkout; it is told to end on the way out, and waited for."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


if __name__ == "__main__":
    typer.run(main)
