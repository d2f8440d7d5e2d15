"""Tensors of the Open Inference Protocol to a text request, and its answer to tensors.

Elements come in typed `contents` or, for all inputs at once, as raw bytes; answers
go out as raw bytes, as Triton's do. Shapes are [1], or [1, 1] from batching clients.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from google.protobuf import json_format
from oip import grpc_service_pb2 as oip
from penstock.v1 import generation_pb2

from core.errors import InvalidInput

# Name to datatype: what the text model takes and gives.
INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "streaming": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
}
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
_LENGTH = struct.Struct("<I")
_COUNT = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class TextInference:
    """What a ModelInferRequest asks for."""

    request: generation_pb2.GenerateRequest
    stream: bool
    excludes_input: bool
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextAnswer:
    """What a ModelInferResponse tells."""

    text: str
    finish_reason: str  # "stop", "length", ...; empty while the answer goes on
    num_input_tokens: int
    num_output_tokens: int


def read_request(message: oip.ModelInferRequest) -> TextInference:
    """Reads the tensors; raises InvalidInput where name, datatype, shape or content is wrong."""
    tensors = _read_inputs(message)
    if "text_input" not in tensors:
        raise InvalidInput("inputs", sorted(tensors), "text_input and, if wanted, the others")
    request = generation_pb2.GenerateRequest(
        model=message.model_name, prompt=_text(tensors["text_input"], "text_input")
    )
    if "sampling_parameters" in tensors:
        text = _text(tensors["sampling_parameters"], "sampling_parameters")
        _read_sampling(text, request.sampling)
    return TextInference(
        request=request,
        stream=bool(tensors.get("stream", tensors.get("streaming", False))),
        excludes_input=bool(tensors.get("exclude_input_in_output", False)),
        outputs=_read_outputs(message),
    )


def write_response(
    answer: TextAnswer, *, to: oip.ModelInferRequest, model: str, outputs: tuple[str, ...]
) -> oip.ModelInferResponse:
    """Writes the answer's tensors, those of `outputs` in that order."""
    response = oip.ModelInferResponse(model_name=model, model_version="1", id=to.id)
    encoded = {
        "text_output": _bytes_element(answer.text),
        "finish_reason": _bytes_element(answer.finish_reason),
        "num_input_tokens": _COUNT.pack(answer.num_input_tokens),
        "num_output_tokens": _COUNT.pack(answer.num_output_tokens),
    }
    for name in outputs:
        response.outputs.add(name=name, datatype=OUTPUTS[name], shape=[1])
        response.raw_output_contents.append(encoded[name])
    return response


def _read_inputs(message: oip.ModelInferRequest) -> dict[str, Any]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        allowed = f"one for each of the {len(message.inputs)} inputs, or none"
        raise InvalidInput("raw_input_contents", f"{len(raw)} entries", allowed)
    tensors: dict[str, Any] = {}
    for index, tensor in enumerate(message.inputs):
        where = f"inputs[{index}]"
        _check_header(tensor, where)
        if tensor.name in tensors:
            raise InvalidInput(f"{where}.name", tensor.name, "each input once")
        if raw:
            if tensor.HasField("contents"):
                raise InvalidInput(f"{where}.contents", "set", "empty beside raw_input_contents")
            tensors[tensor.name] = _raw_element(raw[index], tensor.datatype, index)
        else:
            tensors[tensor.name] = _typed_element(tensor, where)
    return tensors


def _check_header(tensor: oip.ModelInferRequest.InferInputTensor, where: str) -> None:
    expected = INPUTS.get(tensor.name)
    if expected is None:
        raise InvalidInput(f"{where}.name", tensor.name, f"one of {', '.join(INPUTS)}")
    if tensor.datatype != expected:
        raise InvalidInput(f"{where}.datatype", tensor.datatype, f"{expected} for {tensor.name}")
    if not 1 <= len(tensor.shape) <= 2 or prod(tensor.shape) != 1 or min(tensor.shape) != 1:
        raise InvalidInput(f"{where}.shape", list(tensor.shape), f"[1] for {tensor.name}")


def _typed_element(tensor: oip.ModelInferRequest.InferInputTensor, where: str) -> Any:
    contents = tensor.contents
    field = "bool_contents" if tensor.datatype == "BOOL" else "bytes_contents"
    elements = contents.bool_contents if tensor.datatype == "BOOL" else contents.bytes_contents
    num_set = len(contents.ListFields())
    if len(elements) != 1 or num_set != 1:
        given = f"{len(elements)} elements in {field}"
        raise InvalidInput(f"{where}.contents", given, f"1 element in {field}, nothing else")
    return elements[0]


def _raw_element(data: bytes, datatype: str, index: int) -> Any:
    where = f"raw_input_contents[{index}]"
    if datatype == "BOOL":
        if data not in (b"\0", b"\1"):
            raise InvalidInput(where, f"{len(data)} bytes", "1 byte, 0 or 1, for BOOL [1]")
        return data == b"\1"
    size = _LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else -1
    if size != len(data) - _LENGTH.size:
        allowed = "4 bytes of length and that many more, for BYTES [1]"
        raise InvalidInput(where, f"{len(data)} bytes", allowed)
    return data[_LENGTH.size :]


def _text(element: bytes, name: str) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise InvalidInput(name, element, "UTF-8") from None


def _read_outputs(message: oip.ModelInferRequest) -> tuple[str, ...]:
    for index, output in enumerate(message.outputs):
        if output.name not in OUTPUTS:
            allowed = f"one of {', '.join(OUTPUTS)}"
            raise InvalidInput(f"outputs[{index}].name", output.name, allowed)
    return tuple(dict.fromkeys(output.name for output in message.outputs)) or tuple(OUTPUTS)


def _read_sampling(text: str, sampling: generation_pb2.SamplingParameters) -> None:
    """Fields as in generation.proto; numbers may be strings, as some clients send them."""
    try:
        content = json.loads(text, parse_constant=_refuse_constant) if text else {}
    except (ValueError, RecursionError):
        raise InvalidInput("sampling_parameters", text, "a JSON object") from None
    if not isinstance(content, dict):
        raise InvalidInput("sampling_parameters", text, "a JSON object")
    fields = generation_pb2.SamplingParameters.DESCRIPTOR.fields_by_name
    for name, value in content.items():
        if name not in fields:
            # JSON can write half of a surrogate pair, which no message can carry.
            shown = ascii(name)[1:-1]
            raise InvalidInput(f"sampling_parameters.{shown}", value, f"one of {', '.join(fields)}")
        _read_field(name, value, sampling)


def _read_field(name: str, value: Any, sampling: generation_pb2.SamplingParameters) -> None:
    if name == "stop" and isinstance(value, str):
        value = [value]
    one = generation_pb2.SamplingParameters()
    try:
        json_format.ParseDict({name: value}, one)
    except (json_format.ParseError, UnicodeEncodeError):
        kind = "see SamplingParameters of penstock.v1 for its type"
        raise InvalidInput(f"sampling_parameters.{name}", value, kind) from None
    sampling.MergeFrom(one)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _bytes_element(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def parameter(parameters: Mapping[str, oip.InferParameter], name: str) -> bool:
    """A boolean parameter of a request; false when absent or of another type."""
    return name in parameters and parameters[name].bool_param


def describe(
    tensors: Mapping[str, str], add: Callable[..., oip.ModelMetadataResponse.TensorMetadata]
) -> None:
    """Adds each tensor's name, datatype and shape to a ModelMetadataResponse."""
    for name, datatype in tensors.items():
        add(name=name, datatype=datatype, shape=[1])
