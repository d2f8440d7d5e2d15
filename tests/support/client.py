"""A client of the public API for tests: calls that return whole answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from penstock.v1 import coordinator_pb2
from penstock.v1 import generation_pb2 as pb
from penstock.v1.coordinator_pb2_grpc import CoordinatorServiceStub
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.common.credentials import AUTHORITIES, Credentials
from services.common.identity import COORDINATOR, OPERATOR
from services.common.keys import as_metadata

CALL_TIMEOUT_S = 60.0
# Bigger than any message a server of ours takes, so that it is the server that refuses.
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All of a stream's messages, and what they say together."""

    responses: tuple[pb.GenerateResponse, ...]

    @property
    def text(self) -> str:
        return "".join(response.text for response in self.responses)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for response in self.responses for token_id in response.token_ids]

    @property
    def logprobs(self) -> list[pb.PositionLogprobs]:
        return [entry for response in self.responses for entry in response.logprobs]

    @property
    def finish_reason(self) -> int:
        return self.responses[-1].finish_reason

    @property
    def usage(self) -> pb.Usage:
        return self.responses[-1].usage


class Client:
    """Calls a mesh's gateway, with a key if need be, and asks its coordinator how things are."""

    def __init__(
        self, gateway: grpc.Channel, coordinator: grpc.Channel, *, key: str | None = None
    ) -> None:
        self.channel = gateway
        self.generation = GenerationServiceStub(gateway)
        self.coordinator = CoordinatorServiceStub(coordinator)
        self._metadata = as_metadata(key)

    def generate(self, *, timeout_s: float = CALL_TIMEOUT_S, **fields: Any) -> Answer:
        """Generates to the end; `fields` are those of the request, `sampling` may be a dict."""
        return self.send(make_request(**fields), timeout_s=timeout_s)

    def send(self, request: pb.GenerateRequest, *, timeout_s: float = CALL_TIMEOUT_S) -> Answer:
        """Sends a request and waits for the end of its answer."""
        call = self.generation.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return Answer(responses=tuple(call))

    def send_all(self, requests: Iterable[pb.GenerateRequest]) -> list[Answer]:
        """Sends all requests at once; returns the answers in the same order."""
        requests = list(requests)
        with ThreadPoolExecutor(max_workers=len(requests)) as pool:
            return list(pool.map(self.send, requests))

    def mesh(self) -> coordinator_pb2.GetMeshResponse:
        """The state of the mesh."""
        return self.coordinator.GetMesh(coordinator_pb2.GetMeshRequest(), timeout=CALL_TIMEOUT_S)

    def wait_for_mesh(
        self,
        enough: Callable[[coordinator_pb2.GetMeshResponse], bool],
        *,
        timeout_s: float = 60.0,
    ) -> coordinator_pb2.GetMeshResponse:
        """Returns the mesh's state as soon as it is `enough`; fails when it never is."""
        deadline = time.monotonic() + timeout_s
        while True:
            mesh = self.mesh()
            if enough(mesh):
                return mesh
            assert time.monotonic() < deadline, f"the mesh stayed as it is: {mesh}"
            time.sleep(0.02)

    def wait_until_idle(self) -> None:
        """Returns when no request is left, and none holds a KV block on any stage."""
        self.wait_for_mesh(is_idle)


def is_idle(mesh: coordinator_pb2.GetMeshResponse) -> bool:
    """Whether no request is left, and no stage has a KV block in use."""
    blocks = [stage.kv_blocks_used for stage in mesh.stages]
    return not (mesh.requests_running or mesh.requests_waiting or any(blocks))


def make_request(
    *, sampling: dict[str, Any] | None = None, chat: str | None = None, **fields: Any
) -> pb.GenerateRequest:
    """A request; `chat` is short for one message of a user."""
    if chat is not None:
        fields["messages"] = [pb.ChatMessage(role="user", content=chat)]
    return pb.GenerateRequest(sampling=pb.SamplingParameters(**(sampling or {})), **fields)


@contextmanager
def connect(*, gateway: str, coordinator: str) -> Iterator[Client]:
    """A client with channels of its own."""
    with (
        grpc.insecure_channel(gateway, options=OPTIONS) as outer,
        grpc.insecure_channel(coordinator, options=OPTIONS) as inner,
    ):
        yield Client(outer, inner)


@contextmanager
def connect_securely(
    *, gateway: str, coordinator: str, certs: Path, key: str | None = None
) -> Iterator[Client]:
    """A client that knows the mesh's authority, and asks the coordinator as its operator."""
    operator = Credentials(certs / OPERATOR)
    name = operator.identity.peer(COORDINATOR).dns_name
    public = grpc.ssl_channel_credentials((certs / AUTHORITIES).read_bytes())
    named = [*OPTIONS, ("grpc.ssl_target_name_override", name)]
    with (
        grpc.secure_channel(gateway, public, options=OPTIONS) as outer,
        grpc.secure_channel(coordinator, operator.of_channel(), options=named) as inner,
    ):
        yield Client(outer, inner, key=key)


def field_violations(error: grpc.RpcError) -> list[str]:
    """Fields that the google.rpc.BadRequest of an error names."""
    status = rpc_status.from_call(error)
    assert status is not None, "the error has no details"
    found = []
    for packed in status.details:
        details = error_details_pb2.BadRequest()
        if packed.Unpack(details):
            found += [violation.field for violation in details.field_violations]
    return found
