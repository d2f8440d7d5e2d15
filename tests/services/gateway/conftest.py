"""A real gateway in this process, in front of a coordinator that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from oip import grpc_service_pb2_grpc as oip_grpc
from penstock.v1 import generation_pb2 as pb
from penstock.v1 import generation_pb2_grpc

from core.tokens.tokenizer import Tokenizer, load_tokenizer
from services.common.channels import open_channel
from services.common.data_folder import STORE_NAME
from services.common.keys import ApiKey, as_metadata, draw_key, hash_secret
from services.common.store import Store
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


@asynccontextmanager
async def running_gateway(tokenizer: Tokenizer, **settings: Any) -> AsyncIterator[Setup]:
    """A gateway that has found its coordinator; `settings` are added to its own."""
    coordinator = FakeCoordinator()
    coordinator_port = await coordinator.start()
    made = GatewaySettings(
        coordinators=(f"127.0.0.1:{coordinator_port}",),
        model=Path("unused"),
        listen="127.0.0.1:0",
        drain_s=5.0,
        **settings,
    )
    gateway = Gateway(made, tokenizer, no_telemetry())
    port = await gateway.start()
    linking = asyncio.create_task(gateway.link.run())
    async with open_channel(f"127.0.0.1:{port}", max_message_bytes=1 << 28) as channel:
        setup = Setup(
            gateway=gateway,
            coordinator=coordinator,
            coordinator_port=coordinator_port,
            port=port,
            channel=channel,
            tokenizer=tokenizer,
        )
        await setup.wait_for_health(SERVING)
        yield setup
    linking.cancel()
    await asyncio.gather(linking, return_exceptions=True)
    await gateway.close()
    await coordinator.stop()


@pytest.fixture
async def setup(tokenizer: Tokenizer, resume_limit_s: float) -> AsyncIterator[Setup]:
    async with running_gateway(tokenizer, resume_limit_s=resume_limit_s) as setup:
        yield setup


@dataclass(frozen=True, kw_only=True)
class KeyedSetup:
    """A gateway that asks for keys, and the store that they are in."""

    setup: Setup
    store: Store
    data_folder: Path

    def make_key(self, *, tenant: str = "acme", **fields: Any) -> str:
        """A key that counts from now on; `fields` are of ApiKey."""
        text = draw_key()
        hashed = hash_secret(text.secret)
        key = ApiKey(
            key_id=text.key_id, tenant=tenant, secret_hash=hashed, created_at_s=1.0, **fields
        )
        self.store.add_key(key)
        return str(text)

    def generate(self, key: str | None, *more: tuple[str, str], **fields: Any) -> Any:
        """A call of Generate that asks for as much as it must, where `fields` say nothing."""
        sampling = pb.SamplingParameters(max_tokens=8)
        request = pb.GenerateRequest(**{"prompt": "hello", "sampling": sampling} | fields)
        metadata = (*as_metadata(key), *more)
        return self.setup.generation.Generate(request, timeout=30, metadata=metadata)


@pytest.fixture
async def keyed(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[KeyedSetup]:
    folder = tmp_path / "data"
    store = Store(folder / STORE_NAME)
    async with running_gateway(tokenizer, require_keys=True, data_folder=folder) as setup:
        # The gateway asks the store for the first time with the first request.
        yield KeyedSetup(setup=setup, store=store, data_folder=folder)
    store.close()


async def read_all(call: Any) -> list[Any]:
    """All messages of a stream."""
    return [message async for message in call]


async def refusal_of(call: Any) -> grpc.aio.AioRpcError:
    """What a call is refused with, whether it answers once or streams."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (read_all(call) if hasattr(call, "__aiter__") else call)
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: type[Any]) -> Any:
    """The google.rpc detail of this kind, which an error must have."""
    status = rpc_status.from_call(error)
    assert status is not None, "the error has no details"
    found = kind()
    assert any(packed.Unpack(found) for packed in status.details), status
    return found
