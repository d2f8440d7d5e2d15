"""What clients that know nothing of us find: health, reflection, the Open Inference Protocol."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from oip import grpc_service_pb2 as oip
from oip.grpc_service_pb2_grpc import GRPCInferenceServiceStub

from tests.support.client import Client
from tests.support.local_mesh import LocalMesh

MODEL = "smollm2-135m-instruct"
PROMPT = "The days of the week are Monday, Tuesday,"


@pytest.mark.parametrize("name", ["", MODEL, f"{MODEL}/stage/0", f"{MODEL}/stage/1"])
def test_the_mesh_its_model_and_its_stages_are_healthy(client: Client, name: str) -> None:
    request = health_pb2.HealthCheckRequest(service=name)
    answer = health_pb2_grpc.HealthStub(client.channel).Check(request, timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("name", ["gpt-17", f"{MODEL}/stage/2"])
def test_the_health_of_what_does_not_exist_is_not_found(client: Client, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(client.channel).Check(
            health_pb2.HealthCheckRequest(service=name), timeout=30
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_and_describes_generate(client: Client) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="penstock.v1.GenerationService"
        ),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=30)
    names = {service.name for service in listed.list_services_response.service}
    assert {"penstock.v1.GenerationService", "inference.GRPCInferenceService"} <= names
    assert {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names
    files = [
        FileDescriptorProto.FromString(data)
        for data in described.file_descriptor_response.file_descriptor_proto
    ]
    assert "Generate" in {
        method.name for file in files for service in file.service for method in service.method
    }


def test_buf_curl_needs_no_files_of_ours(mesh: LocalMesh) -> None:
    buf = shutil.which("buf", path=Path(sys.executable).parent)
    assert buf is not None
    data = {"prompt": PROMPT, "sampling": {"maxTokens": 8, "temperature": 0}}
    url = f"http://{mesh.address}/penstock.v1.GenerationService/Generate"
    done = subprocess.run(
        [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(data), url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    decoder, text, at = json.JSONDecoder(), done.stdout.strip(), 0
    pieces = []
    while at < len(text):
        message, at = decoder.raw_decode(text, at)
        pieces.append(message.get("text", ""))
        at += len(text[at:]) - len(text[at:].lstrip())
    assert "".join(pieces).startswith(" Wednesday, Thursday")


def text_request(prompt: str, **parameters: Any) -> oip.ModelInferRequest:
    """A request with the tensor names of Triton's language models."""
    request = oip.ModelInferRequest(model_name=MODEL, id="7")
    _add_strings(request, "text_input", prompt)
    _add_strings(request, "sampling_parameters", json.dumps(parameters))
    exclude = request.inputs.add(name="exclude_input_in_output", datatype="BOOL", shape=[1])
    exclude.contents.bool_contents.append(True)
    return request


def _add_strings(request: oip.ModelInferRequest, name: str, text: str) -> None:
    tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text.encode())


def outputs(response: oip.ModelInferResponse) -> dict[str, Any]:
    """First element of each output, from raw bytes or from contents."""
    found: dict[str, Any] = {}
    for index, tensor in enumerate(response.outputs):
        if response.raw_output_contents:
            raw = response.raw_output_contents[index]
            (length,) = struct.unpack_from("<I", raw)
            found[tensor.name] = raw[4 : 4 + length].decode() if tensor.datatype == "BYTES" else raw
        elif tensor.datatype == "BYTES":
            found[tensor.name] = tensor.contents.bytes_contents[0].decode()
    return found


def test_an_open_inference_client_gets_text(client: Client) -> None:
    stub = GRPCInferenceServiceStub(client.channel)
    request = text_request(PROMPT, max_tokens=8, temperature=0)
    response = stub.ModelInfer(request, timeout=60)
    assert response.id == "7"
    assert outputs(response)["text_output"].startswith(" Wednesday, Thursday")


def test_an_open_inference_stream_gives_the_same_text_in_pieces(client: Client) -> None:
    stub = GRPCInferenceServiceStub(client.channel)
    request = text_request(PROMPT, max_tokens=8, temperature=0)
    stream = request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    stream.contents.bool_contents.append(True)
    answers = list(stub.ModelStreamInfer(iter([request]), timeout=60))
    assert not any(answer.error_message for answer in answers)
    pieces = [outputs(answer.infer_response).get("text_output", "") for answer in answers]
    whole = stub.ModelInfer(text_request(PROMPT, max_tokens=8, temperature=0), timeout=60)
    assert len(pieces) > 2
    assert "".join(pieces) == outputs(whole)["text_output"]


def test_an_error_in_a_stream_of_the_protocol_does_not_end_the_stream(client: Client) -> None:
    stub = GRPCInferenceServiceStub(client.channel)
    bad = text_request(PROMPT, temperature=-1)
    good = text_request(PROMPT, max_tokens=4, temperature=0)
    answers = list(stub.ModelStreamInfer(iter([bad, good]), timeout=60))
    assert any("temperature" in answer.error_message for answer in answers)
    texts = [
        outputs(a.infer_response).get("text_output", "") for a in answers if not a.error_message
    ]
    assert "".join(texts).startswith(" Wednesday")


def test_the_protocol_says_what_is_ready_and_what_does_not_exist(client: Client) -> None:
    stub = GRPCInferenceServiceStub(client.channel)
    assert stub.ServerLive(oip.ServerLiveRequest(), timeout=30).live
    assert stub.ServerReady(oip.ServerReadyRequest(), timeout=30).ready
    assert stub.ModelReady(oip.ModelReadyRequest(name=MODEL), timeout=30).ready
    assert not stub.ModelReady(oip.ModelReadyRequest(name="gpt-17"), timeout=30).ready
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelMetadata(oip.ModelMetadataRequest(name="gpt-17"), timeout=30)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
