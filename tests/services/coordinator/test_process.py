"""The coordinator as a process: its options, its metrics, its end."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest

from core.errors import InvalidInput
from services.coordinator.roster import Roster
from services.coordinator.settings import CoordinatorSettings
from tests.services.coordinator.conftest import Gateway
from tests.support.fake_engine import completion
from tests.support.fake_stages import fake_stages
from tests.support.metrics import scrape

ROOT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_serves_reports_metrics_and_ends_cleanly_when_told_to() -> None:
    port, metrics_port = free_port(), free_port()
    async with fake_stages(2) as stages:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.coordinator", "--listen", f"127.0.0.1:{port}"),
            *("--stages", ",".join(stage.address for stage in stages)),
            *("--metrics-port", str(metrics_port)),
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'protos/generated'}"},
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            Gateway(channel) as gateway,
        ):
            await gateway.wait_until_ready()
            assert await gateway.generate([1, 2, 3], 10) == completion([1, 2, 3], 10)
            samples = await asyncio.to_thread(scrape, metrics_port)
            tokens = {"gen_ai_token_type": "output", "gen_ai_request_model": "fake"}
            assert samples.value("penstock_tokens_total", tokens) == 10
            assert samples.value("penstock_tokens_cached_total") == 0
            assert samples.value("penstock_kv_blocks_total", {"penstock_stage_index": "1"}) == 64
            assert samples.value("penstock_requests_running") == 0
            assert samples.value("penstock_request_queue_duration_seconds_count") == 1
            process.send_signal(signal.SIGTERM)
            await gateway.until_the_stream_ends()
        assert await process.wait() == 0


async def test_a_port_for_everyone_without_certificates_is_one_clear_line() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.coordinator", "--listen", "0.0.0.0:0", "--stages", "a:1"),
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'protos/generated'}"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, printed = await process.communicate()
    (line,) = printed.decode().splitlines()
    assert process.returncode == 1
    assert line.startswith("error: listen is '0.0.0.0:0'; allowed: a loopback address")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pulse_timeout_s", 0.0),
        ("max_sequences", 0),
        ("max_waiting", 0),
        ("speculation", -1),
        ("micro_batch_timeout_s", 0.0),
        ("micro_batch_timeout_s", float("nan")),
        ("open_timeout_s", -1.0),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: object) -> None:
    fields = {"listen": "127.0.0.1:0", "roster": Roster(stages=(("a:1",),)), name: value}
    with pytest.raises(InvalidInput, match=name):
        CoordinatorSettings(**fields)  # type: ignore[arg-type]
