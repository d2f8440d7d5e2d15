"""A mesh that asks who calls: certificates between its parts, API keys of its clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.common.credentials import AUTHORITIES, Credentials
from services.common.identity import COORDINATOR, GATEWAY, OPERATOR, SUPERVISOR, stage_role
from services.common.keys import AUTHORIZATION, as_metadata
from services.gateway.access import OPEN_TO_ALL
from tests.fuzz.rpc.calls import OPTIONS, Metadata
from tests.fuzz.rpc.methods import METHODS, RpcMethod, World
from tests.fuzz.rpc.servers import ANSWER_S, PROMPT, Serving, bad_lines, lives, mesh_processes
from tests.support.client import Answer, make_request
from tests.support.local_mesh import LocalMesh
from tests.support.models import TinyModel, write_servable

# Whose the server of an RPC is, and who may call it.
_ROLE_OF = {"coordinator": COORDINATOR, "stage": stage_role(1), "supervisor": SUPERVISOR}
_WRONG_ROLE = {"coordinator": stage_role(0), "stage": GATEWAY, "supervisor": GATEWAY}


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who calls some RPCs, and what all their calls must end with; None: with anything right.

    `role` is that of its certificate; "" for clients. `draws_key`: metadata instead of a key.
    """

    calls: Callable[[RpcMethod], bool]
    role: Callable[[RpcMethod], str] = lambda method: ""
    draws_key: bool = False
    must_end_with: grpc.StatusCode | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(name for name, method in METHODS.items() if self.calls(method))


def _neighbour(method: RpcMethod) -> str:
    return GATEWAY if method.name.endswith(".Connect") else OPERATOR


def _asks_for_keys(method: RpcMethod) -> bool:
    return method.server == "gateway" and not method.path.startswith(OPEN_TO_ALL)


CALLERS: Mapping[str, Caller] = {
    "wrong-role": Caller(
        calls=lambda method: method.server in _WRONG_ROLE,
        role=lambda method: _WRONG_ROLE[method.server],
        must_end_with=grpc.StatusCode.PERMISSION_DENIED,
    ),
    # Not of stages: they would leave the coordinator of the mesh.
    "neighbour": Caller(
        calls=lambda method: method.server in ("coordinator", "supervisor"), role=_neighbour
    ),
    "wrong-key": Caller(
        calls=_asks_for_keys, draws_key=True, must_end_with=grpc.StatusCode.UNAUTHENTICATED
    ),
    "right-key": Caller(calls=lambda method: method.server == "gateway"),
}


class GuardedServers:
    """As `Servers` are to a trial, for one of the callers."""

    stages = ()

    def __init__(self, mesh: LocalMesh, *, key: str) -> None:
        self._mesh = mesh
        self._key = key
        record = mesh.record
        self._certs = Path(record.certs)
        self._processes = mesh_processes(record)
        stages = tuple(one.address for one in record.processes if "stage" in one.name)
        self.world = World(model=record.model, stage_addresses=stages)
        self._addresses = {
            "gateway": record.gateway,
            "coordinator": record.coordinators[0],
            "supervisor": f"unix:{mesh.run_folder.socket_path}",
            "stage": stages[1],
        }
        self.caller = CALLERS["right-key"]
        self._right_answer = self._ask()

    def open_channel(self, method: RpcMethod) -> grpc.aio.Channel:
        """A channel on which its caller's calls of the method go."""
        address = self._addresses[method.server]
        role = self.caller.role(method)
        if not role:
            return grpc.aio.secure_channel(address, self._public(), options=OPTIONS)
        own = Credentials(self._certs / role.replace("/", "-"))
        name = own.identity.peer(_ROLE_OF[method.server]).dns_name
        options = [*OPTIONS, ("grpc.ssl_target_name_override", name)]
        return grpc.aio.secure_channel(address, own.of_channel(), options=options)

    def metadata(self, random: Random) -> Metadata:
        return _wrong_keys(self._key, random) if self.caller.draws_key else as_metadata(self._key)

    @property
    def must_end_with(self) -> grpc.StatusCode | None:
        return self.caller.must_end_with

    def processes(self, server: str) -> list[Serving]:
        return self._processes

    def complaints(self, server: str) -> list[str]:
        """What is wrong after calls: deaths, wrong answers."""
        dead = [one.name for one in self._processes if not lives(one.process)]
        if dead:
            return [f"{', '.join(dead)} died"]
        try:
            answer = self._ask()
        except grpc.RpcError as error:
            return [f"a right call fails: {error!r}"[:400]]
        wrong = answer != self._right_answer
        return [f"a right call is answered by {answer}"] if wrong else []

    def errors_logged(self) -> list[str]:
        own = self.world.stage_addresses
        logs = sorted({one.log for one in self._processes})
        return [line for log in logs for line in bad_lines(log, own_stages=own)]

    def _ask(self) -> list[int]:
        sampling = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
        request = make_request(token_ids=PROMPT, sampling=sampling)
        metadata = as_metadata(self._key)
        with grpc.secure_channel(self._addresses["gateway"], self._public()) as channel:
            stub = GenerationServiceStub(channel)
            responses = stub.Generate(request, timeout=ANSWER_S, metadata=metadata)
            return Answer(responses=tuple(responses)).token_ids

    def _public(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials((self._certs / AUTHORITIES).read_bytes())


@contextmanager
def guarded(folder: Path) -> Iterator[GuardedServers]:
    """Starts a mesh with certificates and keys around a tiny model, and ends it."""
    model = write_servable(folder / "tiny", TinyModel(context_length=64))
    mesh = LocalMesh(runtime=folder, environment={"PENSTOCK_KEYS": "1", "PENSTOCK_CERTS": "auto"})
    mesh.start("--model", str(model), "--stages", "2", "--kv-memory", "16MiB")
    try:
        key = mesh.run("keys", "create", "--tenant", "fuzz").stdout.strip()
        yield GuardedServers(mesh, key=key)
    finally:
        mesh.stop()


def _wrong_keys(key: str, random: Random) -> Metadata:
    """What somebody sends who has no key, but knows how one looks, or its public part."""
    secret = random.randbytes(32).hex()
    id = key.split("_")[1]
    values = (
        *("", "Bearer", "Bearer ", "Basic YTpi", "Bearer penstock_", key, f"Bearer{key}"),
        *(f"Bearer penstock_{id}_{secret}", f"Bearer {key[:-1]}", f"Bearer {key}{key}"),
        *(f"Bearer penstock_{random.randbytes(8).hex()}_{secret}", f"Bearer  {key}", "x" * 4000),
        "".join(chr(random.randrange(33, 127)) for _ in range(random.randrange(1, 200))),
    )
    if random.random() < 0.1:
        return ((AUTHORIZATION, f"Bearer {key}"),) * 2
    chosen = random.choice((None, *values))
    return () if chosen is None else ((AUTHORIZATION, chosen),)
