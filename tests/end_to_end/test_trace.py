"""One request, one trace: from the client's span through the gateway and the coordinator to
every stage, collected by a real OTLP receiver in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from penstock.v1 import generation_pb2 as pb

from tests.support.client import CALL_TIMEOUT_S, Client, connect, make_request
from tests.support.local_mesh import LocalMesh
from tests.support.models import write_servable
from tests.support.otlp_receiver import OtlpReceiver, otlp_receiver

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN_ID = "00f067aa0ba902b7"
NUM_STAGES = 3


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtlpReceiver]:
    with otlp_receiver(tmp_path_factory.mktemp("spans")) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def traced_client(
    receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A mesh of a tiny model whose processes were told of the receiver as any operator would."""
    folder = tmp_path_factory.mktemp("traced")
    mesh = LocalMesh(
        runtime=folder,
        environment={
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        },
    )
    model = write_servable(folder / "tiny")
    # Guesses would be rows of their own.
    exact = ("--speculation", "0", "--kv-memory", "1MiB")
    mesh.start("--model", str(model), "--stages", str(NUM_STAGES), *exact)
    try:
        record = mesh.record
        with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
            yield client
    finally:
        mesh.stop()


def generate_traced(client: Client) -> None:
    request = make_request(
        token_ids=[5, 6, 7], sampling={"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    )
    metadata = [("traceparent", f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01")]
    call = client.generation.Generate(request, timeout=CALL_TIMEOUT_S, metadata=metadata)
    assert list(call)[-1].finish_reason == pb.FINISH_REASON_LENGTH


def ours(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [span for span in spans if span["trace_id"] == TRACE_ID]


def is_complete(spans: list[dict[str, Any]]) -> bool:
    names = [span["name"] for span in ours(spans)]
    return names.count("stage") == NUM_STAGES and {"generate", "queue", "prefill", "decode"} <= set(
        names
    )


def test_a_request_is_one_connected_trace_through_every_process(
    traced_client: Client, receiver: OtlpReceiver
) -> None:
    generate_traced(traced_client)
    spans = ours(receiver.wait_for(is_complete))
    by_id = {span["span_id"]: span for span in spans}
    roots = {span["parent_span_id"] for span in spans} - set(by_id)
    assert roots == {CLIENT_SPAN_ID}
    services = {span["service"] for span in spans}
    assert services == {"penstock-gateway", "penstock-coordinator", "penstock-stage"}
    stages = [span["attributes"] for span in spans if span["name"] == "stage"]
    assert sorted(stage["penstock.stage.index"] for stage in stages) == list(range(NUM_STAGES))
    for stage in stages:
        assert stage["penstock.stage.rows"] == 3 + 11
        assert stage["penstock.stage.compute_seconds"] > 0
        assert stage["penstock.stage.wait_seconds"] >= 0
    # However many tokens there are, the number of spans is the same.
    assert len(spans) < 6 + 2 * NUM_STAGES


def test_the_request_is_described_by_the_gen_ai_conventions(
    traced_client: Client, receiver: OtlpReceiver
) -> None:
    generate_traced(traced_client)
    spans = ours(receiver.wait_for(is_complete))
    attributes = next(span["attributes"] for span in spans if span["name"] == "generate")
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.usage.output_tokens"] == 12
