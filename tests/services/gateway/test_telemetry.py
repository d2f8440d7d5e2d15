"""What a gateway tells of its requests: one span each, in the client's trace, and metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from core import telemetry as names
from core.tokens.tokenizer import Tokenizer
from services.common.channels import open_channel
from services.common.telemetry import start_telemetry
from services.gateway.gateway import Gateway
from services.gateway.settings import GatewaySettings
from tests.services.gateway.conftest import SERVING, wait_for_health
from tests.support.fake_coordinator import FakeCoordinator
from tests.support.metrics import scrape
from tests.support.otlp_receiver import otlp_receiver

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def use_gateway(tokenizer: Tokenizer, coordinator: FakeCoordinator) -> None:
    """One good and one bad request through a gateway with telemetry."""
    telemetry = start_telemetry("penstock-gateway", metrics_port=0)
    address = f"127.0.0.1:{await coordinator.start()}"
    settings = GatewaySettings(coordinators=(address,), model=Path("unused"), listen="127.0.0.1:0")
    gateway = Gateway(settings, tokenizer, telemetry)
    port = await gateway.start()
    linking = asyncio.create_task(gateway.link.run())
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            await generate_both(channel)
        await asyncio.to_thread(check_metrics, telemetry.metrics_port)
    finally:
        linking.cancel()
        await asyncio.gather(linking, return_exceptions=True)
        await gateway.close()
        await coordinator.stop()
        await asyncio.to_thread(telemetry.shutdown)


async def generate_both(channel: grpc.aio.Channel) -> None:
    stub = GenerationServiceStub(channel)
    await wait_for_health(channel, SERVING)
    sampling = pb.SamplingParameters(temperature=0.5, seed=2**64 - 1)
    good = pb.GenerateRequest(
        prompt="a text of forty and more tokens, byte by byte", sampling=sampling
    )
    async for _ in stub.Generate(good, metadata=[("traceparent", TRACEPARENT)]):
        pass
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Generate(pb.GenerateRequest()).read()


def check_metrics(port: int | None) -> None:
    samples = scrape(port)
    model = {"gen_ai_request_model": "tiny"}
    assert samples.value("gen_ai_server_time_to_first_token_seconds_count", model) == 1
    assert samples.value("gen_ai_server_time_per_output_token_seconds_count", model) >= 2
    outcome = "penstock_outcome"
    for name in ("length", "invalid_argument"):
        ended = samples.value("penstock_requests_ended_total", model | {outcome: name})
        assert ended == 1
    for kind in ("input", "output"):
        labels = model | {"gen_ai_token_type": kind}
        assert samples.value("penstock_tokens_total", labels) > 40


async def test_a_request_is_one_span_in_the_clients_trace_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = FakeCoordinator()
    with otlp_receiver(tmp_path) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        await use_gateway(tokenizer, coordinator)
        trace_id = TRACEPARENT.split("-")[1]
        spans = receiver.wait_for(lambda all_spans: len(all_spans) >= 4)
    ours = {span["name"]: span for span in spans if span["trace_id"] == trace_id}
    rpc, generate = ours["penstock.v1.GenerationService/Generate"], ours["generate"]
    assert rpc["parent_span_id"] == TRACEPARENT.split("-")[2]
    assert generate["parent_span_id"] == rpc["span_id"]
    onward = coordinator.submissions[0].traceparent
    assert onward == f"00-{trace_id}-{generate['span_id']}-01"
    attributes = generate["attributes"]
    assert set(attributes) <= set(names.GENERATE_SPAN.attributes)
    assert attributes[names.MODEL] == "tiny"
    assert attributes[names.INPUT_TOKENS] == attributes[names.OUTPUT_TOKENS] > 40
    assert attributes[names.FINISH_REASON] == ["length"]
    assert attributes["gen_ai.request.temperature"] == 0.5
