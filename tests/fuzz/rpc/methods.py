"""Every RPC that a process of a mesh offers, and right calls of each, to be made wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from oip import grpc_service_pb2 as oip
from penstock.v1 import coordinator_pb2, generation_pb2, local_pb2, stage_pb2

from tests.fuzz.rpc import stage_sequences


@dataclass(frozen=True, kw_only=True)
class World:
    """What a right call must know of the mesh."""

    model: str
    stage_addresses: tuple[str, ...]


Sequences = Callable[[Random, World], list[Message]]


@dataclass(frozen=True, kw_only=True)
class RpcMethod:
    """One RPC. `server` is who offers it; `sequences` draws the messages of a right call.

    `may_wait`: its stream goes on for as long as the client likes. `deadline_s`: where the server
    waits for something that may never come; 0: it has no reason to wait.
    """

    name: str
    path: str
    server: str
    request_streaming: bool
    response_streaming: bool
    sequences: Sequences
    may_wait: bool = False
    deadline_s: float = 0.0
    num_at_once: int = 32


# Never a cut that the mesh could have: its processes would be started.
_SPLITS = ("0:1", "0:2,2:3", "0:1,1:1,1:4", "0:999999")


def _generate(random: Random, world: World) -> list[Message]:
    request = generation_pb2.GenerateRequest(model=random.choice(("", world.model)))
    kind = random.randrange(3)
    if kind == 0:
        request.prompt = "hello world"
    elif kind == 1:
        request.messages.add(role="user", content="hello")
    else:
        request.token_ids.extend([5, 6, 7])
    request.sampling.CopyFrom(_sampling(random))
    return [request]


def _generate_many(random: Random, world: World) -> list[Message]:
    messages: list[Message] = []
    for number in range(random.randint(1, 4)):
        message = generation_pb2.GenerateManyRequest(id=random.choice((number, number, 0)))
        if random.random() < 0.8:  # else a cancellation
            message.request.CopyFrom(_generate(random, world)[0])
        if random.random() < 0.3:
            message.timeout.FromSeconds(5)
        messages.append(message)
    return messages


def _sampling(random: Random) -> generation_pb2.SamplingParameters:
    return generation_pb2.SamplingParameters(
        max_tokens=random.randint(1, 3),
        temperature=random.choice((0.0, 1.0)),
        top_k=random.choice((0, 3)),
        top_p=random.choice((1.0, 0.5)),
        min_p=random.choice((0.0, 0.1)),
        repetition_penalty=random.choice((1.0, 1.2)),
        seed=7,
        stop=random.choice(([], ["x"])),
        stop_token_ids=random.choice(([], [3])),
        logprobs=random.choice((0, 2)),
    )


def _tokenize(random: Random, world: World) -> list[Message]:
    request = generation_pb2.TokenizeRequest(model=world.model)
    if random.random() < 0.5:
        request.messages.add(role="user", content="hello")
    else:
        request.prompt = "hello"
    return [request]


def _detokenize(random: Random, world: World) -> list[Message]:
    return [generation_pb2.DetokenizeRequest(model=world.model, token_ids=[5, 6, 200])]


def _named(kind: type[Message], random: Random, world: World) -> list[Message]:
    return [kind(name=world.model, version=random.choice(("", "1")))]  # type: ignore[call-arg]


def _infer(random: Random, world: World) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=world.model, id="1")
    contents: dict[str, Any] = {
        "text_input": b"hello",
        "sampling_parameters": b'{"max_tokens": 2, "temperature": 0}',
        "stream": True,
    }
    is_raw = random.random() < 0.5
    for name, value in contents.items():
        is_text = isinstance(value, bytes)
        tensor = request.inputs.add(name=name, datatype="BYTES" if is_text else "BOOL", shape=[1])
        if is_raw:
            raw = len(value).to_bytes(4, "little") + value if is_text else b"\1"
            request.raw_input_contents.append(raw)
        elif is_text:
            tensor.contents.bytes_contents.append(value)
        else:
            tensor.contents.bool_contents.append(value)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def _stream_infer(random: Random, world: World) -> list[Message]:
    return [_infer(random, world) for _ in range(random.randint(1, 4))]


def _health(random: Random, world: World) -> list[Message]:
    names = ("", world.model, f"{world.model}/stage/0")
    return [health_pb2.HealthCheckRequest(service=random.choice(names))]


def _reflect(random: Random, world: World) -> list[Message]:
    kind = reflection_pb2.ServerReflectionRequest
    requests = [
        kind(list_services=""),
        kind(file_by_filename="penstock/v1/generation.proto"),
        kind(file_containing_symbol="penstock.v1.GenerationService"),
        kind(all_extension_numbers_of_type="google.protobuf.MessageOptions"),
    ]
    return random.sample(requests, random.randint(1, 4))


def _connect(random: Random, world: World) -> list[Message]:
    messages: list[Message] = []
    for number in range(random.randint(1, 3)):
        message = coordinator_pb2.ConnectRequest()
        submission = message.submissions.add(
            request_id=number, token_ids=[5, 6, 7], sampling=_sampling(random), tenant="t"
        )
        submission.sampling.ClearField("stop")
        submission.timeout.FromSeconds(5)
        if random.random() < 0.3:
            message.cancellations.add(request_id=number)
        messages.append(message)
    return messages


def _add_replica(random: Random, world: World) -> list[Message]:
    place = {"stage_index": random.randrange(2), "spare": random.random() < 0.5}
    split = random.choice(("", *_SPLITS))
    return [coordinator_pb2.AddReplicaRequest(address="127.0.0.1:1", split=split, **place)]


def _probe_replica(random: Random, world: World) -> list[Message]:
    address = random.choice(world.stage_addresses)
    request = coordinator_pb2.ProbeReplicaRequest(address=address, token_ids=[5, 6], max_tokens=2)
    request.split = random.choice(("", *_SPLITS))
    return [request]


def _choose_weights(random: Random, world: World) -> list[Message]:
    return [coordinator_pb2.ChooseWeightsRequest(stage_index=1, weights_digest="d")]


def _split(kind: type[Message], random: Random, world: World) -> list[Message]:
    return [kind(split=random.choice(_SPLITS))]  # type: ignore[call-arg]


def _drain(random: Random, world: World) -> list[Message]:
    # Never one of the mesh's own: it would go, as it was told to.
    return [coordinator_pb2.DrainReplicaRequest(address="127.0.0.1:1", moves=True)]


def _try_replica(random: Random, world: World) -> list[Message]:
    # Seldom one that there is, since each starts a process.
    index = random.randrange(2) if random.random() < 0.005 else 2 + random.randrange(9)
    return [local_pb2.TryReplicaRequest(stage_index=index, model_path="/nowhere", spare=True)]


def _address(kind: type[Message], random: Random, world: World) -> list[Message]:
    return [kind(address="127.0.0.1:1")]  # type: ignore[call-arg]


def _empty(method: MethodDescriptor) -> Sequences:
    """For RPCs whose requests say nothing."""
    kind = GetMessageClass(method.input_type)
    return lambda random, world: [kind()]


_SEQUENCES: Mapping[str, Sequences] = {
    "Generate": _generate,
    "GenerateMany": _generate_many,
    "Tokenize": _tokenize,
    "Detokenize": _detokenize,
    "ModelReady": lambda *at: _named(oip.ModelReadyRequest, *at),
    "ModelMetadata": lambda *at: _named(oip.ModelMetadataRequest, *at),
    "ModelInfer": lambda *at: [_infer(*at)],
    "ModelStreamInfer": _stream_infer,
    "Check": _health,
    "Watch": _health,
    "ServerReflectionInfo": _reflect,
    "Connect": _connect,
    "AddReplica": _add_replica,
    "ProbeReplica": _probe_replica,
    "ChooseWeights": _choose_weights,
    "ChooseCut": lambda *at: _split(coordinator_pb2.ChooseCutRequest, *at),
    "DrainReplica": _drain,
    "TryReplica": _try_replica,
    "KeepReplica": lambda *at: _address(local_pb2.KeepReplicaRequest, *at),
    "TryCut": lambda *at: _split(local_pb2.TryCutRequest, *at),
    "KeepCut": lambda *at: _split(local_pb2.KeepCutRequest, *at),
    "StopReplica": lambda *at: _address(local_pb2.StopReplicaRequest, *at),
    "Control": lambda random, world: stage_sequences.orders(random),
    "Activate": lambda random, world: stage_sequences.frames(random),
}
_MAY_WAIT = frozenset({"Watch", "Connect", "DrainReplica", "TryReplica", "TryCut"})
# A stage has one Control stream at a time: others end it.
_NUM_AT_ONCE = {"Control": 1, "TryReplica": 4}
# An epoch that has not begun is waited for.
_DEADLINES_S = {"Activate": 1.0}
_SERVICES: tuple[tuple[str, ServiceDescriptor], ...] = (
    ("gateway", generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]),
    ("gateway", oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]),
    ("gateway", health_pb2.DESCRIPTOR.services_by_name["Health"]),
    ("gateway", reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]),
    ("coordinator", coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"]),
    ("supervisor", local_pb2.DESCRIPTOR.services_by_name["SupervisorService"]),
    ("stage", stage_pb2.DESCRIPTOR.services_by_name["StageService"]),
)


def _methods() -> Iterable[RpcMethod]:
    for server, service in _SERVICES:
        for method in service.methods:
            yield RpcMethod(
                name=f"{service.name}.{method.name}",
                path=f"/{service.full_name}/{method.name}",
                server=server,
                request_streaming=method.client_streaming,
                response_streaming=method.server_streaming,
                sequences=_SEQUENCES.get(method.name) or _empty(method),
                may_wait=method.name in _MAY_WAIT,
                deadline_s=_DEADLINES_S.get(method.name, 0.0),
                num_at_once=_NUM_AT_ONCE.get(method.name, 32),
            )


METHODS: Mapping[str, RpcMethod] = {method.name: method for method in _methods()}
