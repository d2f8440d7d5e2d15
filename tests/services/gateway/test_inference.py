"""The Open Inference Protocol: Triton's behaviour on the text model, better where it is weak."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterable
from typing import Any

import grpc
import pytest
from oip import grpc_service_pb2 as oip
from penstock.v1 import coordinator_pb2

from tests.services.gateway.conftest import Setup
from tests.support.fake_coordinator import end, tokens

Tensor = oip.ModelInferRequest.InferInputTensor


def text_tensor(name: str, text: str | bytes, /, **changes: Any) -> Tensor:
    data = text.encode() if isinstance(text, str) else text
    contents = oip.InferTensorContents(bytes_contents=[data])
    fields = {"name": name, "datatype": "BYTES", "shape": [1], "contents": contents}
    return Tensor(**(fields | changes))


def bool_tensor(name: str, value: bool) -> Tensor:
    contents = oip.InferTensorContents(bool_contents=[value])
    return Tensor(name=name, datatype="BOOL", shape=[1], contents=contents)


def infer_request(
    text: str = "hello", *tensors: Tensor, model: str = "tiny", **fields: Any
) -> oip.ModelInferRequest:
    inputs = [text_tensor("text_input", text), *tensors]
    return oip.ModelInferRequest(model_name=model, inputs=inputs, **fields)


def outputs_of(response: oip.ModelInferResponse) -> dict[str, Any]:
    """Names and values of a response's tensors, read as a client would."""
    values: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        assert list(tensor.shape) == [1]
        if tensor.datatype == "BYTES":
            assert struct.unpack_from("<I", raw)[0] == len(raw) - 4
            values[tensor.name] = raw[4:].decode()
        else:
            assert tensor.datatype == "UINT32"
            values[tensor.name] = struct.unpack("<I", raw)[0]
    return values


async def stream(
    setup: Setup, requests: Iterable[oip.ModelInferRequest]
) -> list[oip.ModelStreamInferResponse]:
    call = setup.inference.ModelStreamInfer(iter(requests), timeout=30)
    return [response async for response in call]


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_server_and_model_tell_what_they_are(setup: Setup) -> None:
    stub = setup.inference
    assert (await stub.ServerLive(oip.ServerLiveRequest())).live
    assert (await stub.ServerReady(oip.ServerReadyRequest())).ready
    assert (await stub.ServerMetadata(oip.ServerMetadataRequest())).name == "penstock"
    metadata = await stub.ModelMetadata(oip.ModelMetadataRequest(name="tiny"))
    assert (metadata.name, list(metadata.versions)) == ("tiny", ["1"])
    inputs = {(tensor.name, tensor.datatype, *tensor.shape) for tensor in metadata.inputs}
    assert {("text_input", "BYTES", 1), ("stream", "BOOL", 1)} <= inputs
    assert {tensor.name for tensor in metadata.outputs} == {
        *("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")
    }


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [("tiny", "", True), ("tiny", "1", True), ("tiny", "2", False), ("gpt-7", "", False)],
)
async def test_readiness_of_an_unknown_model_is_false_and_no_error(
    setup: Setup, name: str, version: str, ready: bool
) -> None:
    request = oip.ModelReadyRequest(name=name, version=version)
    assert (await setup.inference.ModelReady(request)).ready is ready


@pytest.mark.parametrize(("name", "version"), [("gpt-7", ""), ("tiny", "2"), ("", "")])
async def test_an_unknown_model_or_version_is_not_found(
    setup: Setup, name: str, version: str
) -> None:
    metadata = setup.inference.ModelMetadata(oip.ModelMetadataRequest(name=name, version=version))
    assert await code_of(metadata) is grpc.StatusCode.NOT_FOUND
    request = infer_request(model=name, model_version=version)
    assert await code_of(setup.inference.ModelInfer(request)) is grpc.StatusCode.NOT_FOUND


async def test_infer_answers_once_with_prompt_and_completion(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [
        tokens(*setup.tokenizer.encode(" world")),
        end("STOP"),
    ]
    response = await setup.inference.ModelInfer(infer_request(id="seven"))
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "seven")
    assert outputs_of(response) == {
        "text_output": "hello world",
        "finish_reason": "stop",
        "num_input_tokens": 1,
        "num_output_tokens": len(setup.tokenizer.encode(" world")),
    }


async def test_the_prompt_is_left_out_and_outputs_are_chosen_on_demand(setup: Setup) -> None:
    wanted = [oip.ModelInferRequest.InferRequestedOutputTensor(name="text_output")]
    request = infer_request("hello", bool_tensor("exclude_input_in_output", True), outputs=wanted)
    assert outputs_of(await setup.inference.ModelInfer(request)) == {"text_output": "hello"}


async def test_sampling_parameters_come_as_json(setup: Setup) -> None:
    sampling = {"temperature": "0.5", "max_tokens": 3, "stop": "x", "seed": 2**63, "top_k": 4}
    request = infer_request("hello", text_tensor("sampling_parameters", json.dumps(sampling)))
    await setup.inference.ModelInfer(request)
    seen = setup.coordinator.submissions[0].sampling
    assert (seen.temperature, seen.max_tokens, seen.seed, seen.top_k) == (0.5, 3, 2**63, 4)


async def test_raw_inputs_are_read(setup: Setup) -> None:
    request = infer_request("", bool_tensor("exclude_input_in_output", False))
    for tensor in request.inputs:
        tensor.ClearField("contents")
        tensor.shape[:] = [1, 1]
    request.raw_input_contents[:] = [struct.pack("<I", 5) + b"hello", b"\1"]
    response = await setup.inference.ModelInfer(request)
    assert outputs_of(response)["text_output"] == "hello"


def changed(**fields: Any) -> oip.ModelInferRequest:
    return oip.ModelInferRequest(
        model_name="tiny", inputs=[text_tensor("text_input", "hello", **fields)]
    )


def raw(*contents: bytes) -> oip.ModelInferRequest:
    inputs = [Tensor(name="text_input", datatype="BYTES", shape=[1])]
    return oip.ModelInferRequest(model_name="tiny", inputs=inputs, raw_input_contents=contents)


def with_sampling(text: str | bytes) -> oip.ModelInferRequest:
    return infer_request("hello", text_tensor("sampling_parameters", text))


BAD = {
    "no input": oip.ModelInferRequest(model_name="tiny"),
    "unknown input": changed(name="prompt"),
    "wrong datatype": changed(datatype="FP32"),
    "wrong batch": changed(shape=[2]),
    "negative shape": changed(shape=[-1, -1]),
    "no shape": changed(shape=[]),
    "no contents": changed(contents=oip.InferTensorContents()),
    "contents of another type": changed(contents=oip.InferTensorContents(fp32_contents=[1])),
    "two elements": changed(contents=oip.InferTensorContents(bytes_contents=[b"a", b"b"])),
    "contents of two types": changed(
        contents=oip.InferTensorContents(bytes_contents=[b"a"], bool_contents=[True])
    ),
    "no UTF-8": changed(contents=oip.InferTensorContents(bytes_contents=[b"\xff"])),
    "the same input twice": infer_request("a", text_tensor("text_input", "b")),
    "empty text": infer_request(""),
    "unknown output": infer_request(
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name="logits")]
    ),
    "short raw bytes": raw(b"\5\0\0\0hell"),
    "long raw bytes": raw(b"\5\0\0\0hello!"),
    "no raw length": raw(b"\5"),
    "too many raw contents": raw(b"\1\0\0\0a", b"\1"),
    "raw and typed contents": infer_request(raw_input_contents=[b"\1\0\0\0a"]),
    "sampling no JSON": with_sampling("{"),
    "sampling no object": with_sampling("[1]"),
    "sampling nested deeply": with_sampling("[" * 100_000),
    "sampling NaN": with_sampling('{"temperature": NaN}'),
    "sampling string NaN": with_sampling('{"temperature": "NaN"}'),
    "sampling of unknown name": with_sampling('{"heat": 1}'),
    "sampling of wrong type": with_sampling('{"max_tokens": [1]}'),
    "sampling out of range": with_sampling('{"max_tokens": -1}'),
    "sampling lone surrogate": with_sampling('{"stop": ["\\ud800"]}'),
    "sampling no UTF-8": with_sampling(b'{"stop": "\xff"}'),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_tensors_are_refused_once_and_in_a_stream_that_lives_on(
    setup: Setup, name: str
) -> None:
    assert await code_of(setup.inference.ModelInfer(BAD[name])) is grpc.StatusCode.INVALID_ARGUMENT
    bad = oip.ModelInferRequest()
    bad.CopyFrom(BAD[name])
    bad.id = "bad"
    responses = await stream(setup, [bad, infer_request(id="good")])
    by_id = {response.infer_response.id: response for response in responses}
    assert by_id["bad"].error_message
    assert not by_id["bad"].infer_response.outputs
    assert not by_id["good"].error_message
    assert outputs_of(by_id["good"].infer_response)["text_output"] == "hellohello"


async def test_a_stream_sends_deltas_where_asked(setup: Setup) -> None:
    for name in ("stream", "streaming"):
        request = infer_request("one two", bool_tensor(name, True), id="7")
        responses = await stream(setup, [request])
        pieces = [outputs_of(response.infer_response) for response in responses]
        assert "".join(piece["text_output"] for piece in pieces) == "one twoone two"
        assert len(pieces) > 2
        assert [piece["finish_reason"] for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
        counts = [piece["num_output_tokens"] for piece in pieces]
        assert counts == sorted(counts)
        assert counts[-1] == len(setup.tokenizer.encode("one two"))
        assert {response.infer_response.id for response in responses} == {"7"}
        assert not responses[-1].infer_response.parameters


async def test_a_stream_answers_once_where_deltas_are_not_asked_for(setup: Setup) -> None:
    (response,) = await stream(setup, [infer_request("one two")])
    assert outputs_of(response.infer_response)["text_output"] == "one twoone two"


@pytest.mark.parametrize("good", [True, False])
async def test_the_final_response_is_marked_where_asked(setup: Setup, good: bool) -> None:
    request = infer_request("one two" if good else "", bool_tensor("stream", True))
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    responses = await stream(setup, [request])
    marks = [
        response.infer_response.parameters["triton_final_response"].bool_param
        for response in responses
    ]
    assert marks == [False] * (len(marks) - 1) + [True]


async def test_requests_of_a_stream_run_beside_each_other(setup: Setup) -> None:
    """The first is answered only after the second: one after the other would hang.

    They are tokenised in threads, so that either may come to the coordinator first.
    """
    held = asyncio.Queue[int]()

    def script(submission: coordinator_pb2.Submission) -> list[coordinator_pb2.RequestUpdate]:
        if len(submission.token_ids) == 1:
            return [end("STOP")]
        held.put_nowait(submission.request_id)
        return []

    setup.coordinator.script = script
    call = setup.inference.ModelStreamInfer(timeout=30)
    await call.write(infer_request("two words", id="first"))
    await call.write(infer_request("a", id="second"))
    assert (await call.read()).infer_response.id == "second"  # type: ignore[union-attr]
    setup.coordinator.send(await asyncio.wait_for(held.get(), 30), end("STOP"))
    assert (await call.read()).infer_response.id == "first"  # type: ignore[union-attr]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_a_stream_that_is_cancelled_cancels_its_requests(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    call = setup.inference.ModelStreamInfer(timeout=30)
    for index in range(3):
        await call.write(infer_request("a", bool_tensor("stream", True), id=str(index)))
    for _ in range(3):
        await call.read()
    call.cancel()
    cancelled = {await asyncio.wait_for(setup.coordinator.cancelled.get(), 30) for _ in range(3)}
    assert cancelled == {submission.request_id for submission in setup.coordinator.submissions}


async def test_bytes_that_are_no_request_end_a_stream_after_what_came_before(setup: Setup) -> None:
    method = "/inference.GRPCInferenceService/ModelStreamInfer"
    good = infer_request(id="good").SerializeToString()
    call = setup.channel.stream_stream(
        method, response_deserializer=oip.ModelStreamInferResponse.FromString
    )(iter([good, b"\x0a\x02\xff\xfe"]), timeout=30)
    assert (await call.read()).infer_response.id == "good"
    assert await code_of(call.read()) is grpc.StatusCode.INVALID_ARGUMENT
