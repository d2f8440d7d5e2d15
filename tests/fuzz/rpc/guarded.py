"""A mesh that asks who calls: certificates between its parts, API keys of its clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc

from services.common.credentials import AUTHORITIES, Credentials, credentials_of_client
from services.common.identity import (
    COORDINATOR,
    GATEWAY,
    OPERATOR,
    SUPERVISOR,
    name_of,
    stage_role,
)
from services.common.keys import AUTHORIZATION, as_metadata
from services.gateway.access import OPEN_TO_ALL
from tests.fuzz.rpc.calls import OPTIONS, Metadata
from tests.fuzz.rpc.methods import METHODS, RpcMethod
from tests.fuzz.rpc.servers import STAGE_CALLED, LoneStage, Servers, lone_stages, tiny_mesh
from tests.support.client import Client, connect_securely
from tests.support.local_mesh import LocalMesh

_WRONG_ROLE = {"coordinator": stage_role(0), "stage": GATEWAY, "supervisor": GATEWAY}
# Who may call a method; of all others an operator.
_NEIGHBOUR = {
    "CoordinatorService.Connect": GATEWAY,
    "StageService.Control": COORDINATOR,
    "StageService.Activate": stage_role(0),
}


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


def _role_of_server(method: RpcMethod) -> str:
    if method.server == "stage":
        return stage_role(STAGE_CALLED[method.name])
    return {"coordinator": COORDINATOR, "supervisor": SUPERVISOR}[method.server]


def _asks_for_keys(method: RpcMethod) -> bool:
    return method.server == "gateway" and not method.path.startswith(OPEN_TO_ALL)


CALLERS: Mapping[str, Caller] = {
    "wrong-role": Caller(
        calls=lambda method: method.server in _WRONG_ROLE,
        role=lambda method: _WRONG_ROLE[method.server],
        must_end_with=grpc.StatusCode.PERMISSION_DENIED,
    ),
    "neighbour": Caller(
        calls=lambda method: method.server in _WRONG_ROLE,
        role=lambda method: _NEIGHBOUR.get(method.name, OPERATOR),
    ),
    "wrong-key": Caller(
        calls=_asks_for_keys, draws_key=True, must_end_with=grpc.StatusCode.UNAUTHENTICATED
    ),
    "right-key": Caller(calls=lambda method: method.server == "gateway"),
}


class GuardedServers(Servers):
    """Servers that ask who calls; the calls of a trial are those of `caller`."""

    def __init__(self, mesh: LocalMesh, stages: Sequence[LoneStage], *, key: str) -> None:
        self._certs = Path(mesh.record.certs)
        self._key = key
        self.coordinator = Credentials(self._certs / COORDINATOR)
        self.caller = CALLERS["right-key"]
        super().__init__(mesh, stages)

    def open_channel(self, method: RpcMethod) -> grpc.aio.Channel:
        role, address = self.caller.role(method), self.address(method)
        if not role:
            public = credentials_of_client(self._certs / AUTHORITIES)
            return grpc.aio.secure_channel(address, public, options=OPTIONS)
        own = Credentials(self._certs / name_of(role))
        options = [*OPTIONS, _named(own, _role_of_server(method))]
        return grpc.aio.secure_channel(address, own.of_channel(), options=options)

    def metadata(self, random: Random) -> Metadata:
        return _wrong_keys(self._key, random) if self.caller.draws_key else as_metadata(self._key)

    @property
    def must_end_with(self) -> grpc.StatusCode | None:
        return self.caller.must_end_with

    def _connect(self) -> AbstractContextManager[Client]:
        reached = {name: self._addresses[name] for name in ("gateway", "coordinator")}
        return connect_securely(**reached, certs=self._certs, key=self._key)

    def _dial_supervisor(self, address: str) -> grpc.Channel:
        operator = Credentials(self._certs / OPERATOR)
        named = [_named(operator, SUPERVISOR)]
        return grpc.secure_channel(address, operator.of_channel(), options=named)


@contextmanager
def guarded(folder: Path) -> Iterator[GuardedServers]:
    """Starts the same as `serving`, with certificates and keys, and ends it."""
    asks = {"PENSTOCK_KEYS": "1", "PENSTOCK_CERTS": "auto"}
    with tiny_mesh(folder, **asks) as mesh, lone_stages(mesh, folder) as stages:
        key = mesh.run("keys", "create", "--tenant", "fuzz").stdout.strip()
        yield GuardedServers(mesh, stages, key=key)


def _named(own: Credentials, role: str) -> tuple[str, str]:
    """The option by which a channel asks for a role, whatever the address."""
    return ("grpc.ssl_target_name_override", own.identity.peer(role).dns_name)


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
