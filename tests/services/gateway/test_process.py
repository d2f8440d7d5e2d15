"""The gateway as a process: what it imports, how it starts, drains and refuses to start."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.common.channels import open_channel
from tests.services.gateway.conftest import NOT_SERVING, SERVING, wait_for_health
from tests.support.fake_coordinator import FakeCoordinator, end, tokens
from tests.support.tiny_tokenizer import write_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "services.gateway", *options]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_it_imports_neither_torch_nor_numba() -> None:
    program = (
        "import sys, services.gateway.__main__; "
        "print([name for name in ('torch', 'numba', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


async def test_a_signal_lets_open_requests_finish_and_ends_with_exit_code_0(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    coordinator.script = lambda _: [tokens(65)]
    coordinator_address = f"127.0.0.1:{await coordinator.start()}"
    address = f"127.0.0.1:{free_port()}"
    folder = str(write_tiny_tokenizer(tmp_path))
    process = await asyncio.create_subprocess_exec(
        *command("--listen", address, "--coordinator", coordinator_address, "--model", folder),
        cwd=ROOT,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with open_channel(address) as channel:
            stub = GenerationServiceStub(channel)
            await wait_for_health(channel, SERVING)
            call = stub.Generate(pb.GenerateRequest(prompt="a"), timeout=60)
            await call.read()
            process.send_signal(signal.SIGTERM)
            await wait_for_health(channel, NOT_SERVING)
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
                await stub.Generate(pb.GenerateRequest(prompt="a"), timeout=60).read()
            coordinator.send(coordinator.submissions[0].request_id, end("LENGTH", 66))
            last = await call.read()
            assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await coordinator.stop()


@pytest.mark.parametrize(
    "what", ["missing model", "damaged model", "taken port", "bad address", "open to everyone"]
)
def test_what_it_cannot_start_with_is_one_clear_line(tmp_path: Path, what: str) -> None:
    model, listen = write_tiny_tokenizer(tmp_path), "127.0.0.1:0"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if what == "missing model":
            model = tmp_path / "nothing.gguf"
        elif what == "damaged model":
            (model / "tokenizer.json").write_text("{")
        elif what == "taken port":
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
        elif what == "open to everyone":
            listen = "0.0.0.0:0"
        else:
            listen = "nowhere"
        options = ("--coordinator", "127.0.0.1:1", "--listen", listen, "--model", str(model))
        done = subprocess.run(command(*options), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert "Traceback" not in done.stderr
