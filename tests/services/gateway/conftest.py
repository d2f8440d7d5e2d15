"""A real gateway in this process, in front of a coordinator that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from oip import grpc_service_pb2_grpc as oip_grpc
from penstock.v1 import generation_pb2_grpc

from core.tokens.tokenizer import Tokenizer, load_tokenizer
from services.common.channels import open_channel
from services.common.telemetry import no_telemetry
from services.gateway.gateway import Gateway
from services.gateway.settings import GatewaySettings
from tests.support.fake_coordinator import FakeCoordinator
from tests.support.tiny_tokenizer import write_tiny_tokenizer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A gateway, its coordinator and a client's channel."""

    gateway: Gateway
    coordinator: FakeCoordinator
    coordinator_port: int
    port: int
    channel: grpc.aio.Channel
    tokenizer: Tokenizer

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def inference(self) -> oip_grpc.GRPCInferenceServiceAsyncStub:
        return oip_grpc.GRPCInferenceServiceStub(self.channel)

    async def wait_for_health(self, status: int, *, name: str = "") -> None:
        """Returns as soon as health says `status` of `name`."""
        await wait_for_health(self.channel, status, name=name)


async def wait_for_health(channel: grpc.aio.Channel, status: int, *, name: str = "") -> None:
    """Returns as soon as a server's health says `status` of `name`."""
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=name)
    call = stub.Watch(request, timeout=30, wait_for_ready=True)
    async for response in call:
        if response.status == status:
            call.cancel()
            return
    raise AssertionError("the watch ended")


def retry_delay_s(error: grpc.aio.AioRpcError) -> float | None:
    """What the RetryInfo of an error says; None where it has none."""
    retry = error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    found = [detail for detail in status.details if detail.Unpack(retry)]
    return retry.retry_delay.ToNanoseconds() / 1e9 if found else None


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    loaded = load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tiny")))
    yield loaded
    loaded.close()


@pytest.fixture
def resume_limit_s() -> float:
    """So long that it never passes; tests of what happens then choose another."""
    return 600.0


@pytest.fixture
async def setup(tokenizer: Tokenizer, resume_limit_s: float) -> AsyncIterator[Setup]:
    """A gateway that has found its coordinator."""
    coordinator = FakeCoordinator()
    coordinator_port = await coordinator.start()
    settings = GatewaySettings(
        coordinators=(f"127.0.0.1:{coordinator_port}",),
        model=Path("unused"),
        listen="127.0.0.1:0",
        drain_s=5.0,
        resume_limit_s=resume_limit_s,
    )
    gateway = Gateway(settings, tokenizer, no_telemetry())
    port = await gateway.start()
    linking = asyncio.create_task(gateway.link.run())
    async with open_channel(f"127.0.0.1:{port}", max_message_bytes=1 << 28) as channel:
        made = Setup(
            gateway=gateway,
            coordinator=coordinator,
            coordinator_port=coordinator_port,
            port=port,
            channel=channel,
            tokenizer=tokenizer,
        )
        await made.wait_for_health(SERVING)
        yield made
    linking.cancel()
    await asyncio.gather(linking, return_exceptions=True)
    await gateway.close()
    await coordinator.stop()
