"""Stage processes with a real engine: equal to the unsplit model, and clear when they cannot."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import CorruptWeights
from core.models.registry import load_config
from core.sampling.parameters import SamplingParameters
from core.weights.open import open_checkpoint
from services.common.channels import open_channel
from services.common.logs import COMPILING
from services.stage.model import LoadedModel
from services.stage.process import run_stage
from services.stage.settings import StageSettings
from tests.support.chain import Chain
from tests.support.metrics import scrape
from tests.support.models import TinyModel, write_hugging_face
from tests.support.stages import ControlStream, HandDrivenCoordinator, micro_batch, start

ROOT = Path(__file__).resolve().parents[3]
# Generous: the first process on a machine compiles the kernels.
START_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class StageProcess:
    """A stage in a process of its own, loaded and serving."""

    address: str
    metrics_port: int
    ready: dict[str, Any]


def command(model: Path, layers: str, *options: str) -> list[str]:
    arguments = ["--model", str(model), "--name", "tiny", "--layers", layers]
    listen = [] if "--listen" in options else ["--listen", "127.0.0.1:0"]
    return [sys.executable, "-m", "services.stage", *arguments, *listen, *options]


@contextmanager
def stage_process(model: Path, layers: str, *options: str) -> Iterator[StageProcess]:
    """Runs a stage; asserts that it ends cleanly when its standard input does."""
    options = (*options, "--metrics-port", "0", "--exit-with-parent")
    process = subprocess.Popen(
        command(model, layers, *options),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            listens, ready = (
                read_event(process, "stage listens"),
                read_event(process, "stage ready"),
            )
            yield StageProcess(
                address=f"127.0.0.1:{listens['port']}",
                metrics_port=listens["metrics_port"],
                ready=ready,
            )
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def read_event(process: subprocess.Popen[str], message: str) -> dict[str, Any]:
    """Reads the next line of the log, or the one after where kernels are compiled before."""
    assert process.stderr is not None
    line = process.stderr.readline()
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        pytest.fail(line + process.stderr.read())
    if event["message"] == COMPILING:
        return read_event(process, message)
    assert event["message"] == message
    return event


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hugging_face(tmp_path_factory.mktemp("tiny"), TinyModel())


@pytest.mark.timeout(START_TIMEOUT_S)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
async def test_split_over_processes_a_model_computes_the_same_tokens(
    tiny: Path, dtype: str
) -> None:
    prompts: list[Sequence[int]] = [[5, 6, 7, 8, 9], [200, 3], list(range(30, 70))]
    num_tokens = 6
    checkpoint = open_checkpoint(tiny)
    unsplit = Chain(checkpoint, load_config(checkpoint), number_format=dtype, num_kv_blocks=64)
    sampling = SamplingParameters(max_tokens=num_tokens, temperature=0.0)
    expected = unsplit.generate(prompts, [sampling] * len(prompts))
    with ExitStack() as stack:
        stages = [
            stack.enter_context(stage_process(tiny, layers, "--dtype", dtype, "--kv-blocks", "64"))
            for layers in ("0:1", "1:3", "3:4")
        ]
        async with HandDrivenCoordinator(stages) as coordinator:
            readies = await coordinator.open()
            seen = await generate(coordinator, prompts, num_tokens=num_tokens)
            await coordinator.controls[1].next("report")
            samples = scrape(stages[1].metrics_port)
        await check_health(stages[1].address)
    assert seen == expected
    assert len({ready.model_digest for ready in readies}) == 1
    assert len({ready.numerics_fingerprint for ready in readies}) == 1
    assert [(ready.first_layer, ready.end_layer) for ready in readies] == [(0, 1), (1, 3), (3, 4)]
    assert readies[1].weights_bytes == stages[1].ready["weights_bytes"] > 0
    assert 0 < readies[1].bytes_read == stages[1].ready["bytes_read"]
    labels = {"gen_ai_request_model": "tiny", "penstock_stage_index": "1"}
    assert samples.value("penstock_stage_micro_batches_total", labels) == num_tokens
    assert samples.value("penstock_stage_busy_seconds_total", labels) > 0
    assert samples.value("penstock_kv_blocks_used", labels) == 3 * BLOCKS_PER_SEQUENCE


BLOCKS_PER_SEQUENCE = 4


async def generate(
    coordinator: HandDrivenCoordinator, prompts: Sequence[Sequence[int]], *, num_tokens: int
) -> list[list[int]]:
    """Greedy tokens of all prompts, as one batch."""
    first = micro_batch(
        1, dict(enumerate(prompts)), starts=[start(slot) for slot in range(len(prompts))]
    )
    num_blocks = len(prompts) * BLOCKS_PER_SEQUENCE
    del first.updates.block_slots[:], first.updates.block_ids[:]
    first.updates.block_slots.extend(id // BLOCKS_PER_SEQUENCE for id in range(num_blocks))
    first.updates.block_ids.extend(range(num_blocks))
    await coordinator.run(first)
    outputs: list[list[int]] = [[] for _ in prompts]
    for id in range(2, num_tokens + 2):
        tokens = (await coordinator.sampled()).token_ids
        for output, token in zip(outputs, tokens, strict=True):
            output.append(token)
        if id == num_tokens + 1:
            break
        batch = micro_batch(id, {slot: [token] for slot, token in enumerate(tokens)})
        del batch.first_positions[:]
        batch.first_positions.extend(len(prompt) + id - 2 for prompt in prompts)
        await coordinator.run(batch)
    return outputs


async def check_health(address: str) -> None:
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "tiny/stage/1"):
            request = health_pb2.HealthCheckRequest(service=name)
            response = await stub.Check(request, timeout=30)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Check(health_pb2.HealthCheckRequest(service="tiny/stage/0"), timeout=30)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def error_line(model: Path, layers: str, *options: str) -> str:
    """Runs a stage that cannot start; returns its one line about it."""
    done = subprocess.run(
        command(model, layers, *options), cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    *logs, line = done.stderr.splitlines()
    assert all(log.startswith("{") for log in logs), done.stderr
    return line


def test_layers_that_the_model_has_not_are_one_clear_line(tiny: Path) -> None:
    assert error_line(tiny, "0:99") == "error: layers is '0:99'; allowed: within 0:4, all there are"


def test_layers_that_are_none_are_one_clear_line(tiny: Path) -> None:
    assert error_line(tiny, "three").startswith("error: layers is 'three'; allowed: FIRST:END")


class PortOf(logging.Handler):
    """Hears from the log which port a stage in this process listens on."""

    def __init__(self) -> None:
        super().__init__()
        self.port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "stage listens":
            self.port.set_result(vars(record)["port"])


async def test_who_waits_for_a_model_that_cannot_be_loaded_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begin = threading.Event()

    def load(settings: StageSettings) -> LoadedModel:
        assert begin.wait(60)
        raise CorruptWeights("cut short")

    caplog.set_level("INFO")
    heard = PortOf()
    logging.getLogger("services.stage").addHandler(heard)
    settings = StageSettings(
        model=Path("none"), name="tiny", first_layer=0, end_layer=4, listen="127.0.0.1:0"
    )
    stage = asyncio.create_task(run_stage(settings, load=load))
    async with ControlStream(f"127.0.0.1:{await heard.port}") as control:
        logging.getLogger("services.stage").removeHandler(heard)
        await control.open(epoch=1, index=0, num_stages=1)
        begin.set()
        assert (await control.failure()).code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(CorruptWeights, match="cut short"):
            await stage


def test_damaged_weights_are_one_clear_line(tmp_path: Path) -> None:
    model = write_hugging_face(tmp_path, TinyModel())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = error_line(model, "0:4")
    assert line.startswith("error: ")
    assert str(weights) in line


def test_a_taken_port_is_one_clear_line(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = error_line(tiny, "0:4", "--listen", address)
    assert line.startswith(f"error: listen is '{address}'")


def test_a_port_for_everyone_without_certificates_is_one_clear_line(tiny: Path) -> None:
    line = error_line(tiny, "0:4", "--listen", "0.0.0.0:0")
    assert line.startswith("error: listen is '0.0.0.0:0'; allowed: a loopback address")
    assert "--certs FOLDER" in line
    assert "--insecure" in line
