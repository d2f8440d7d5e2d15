"""Who a part of the mesh is, and who may call whom.

A certificate names its holder by a URI in the way of SPIFFE, spiffe://penstock/MESH/ROLE, which
servers read, and by a DNS name of the same meaning, which gRPC's clients can check. Roles are
gateway, coordinator, stage/N (all replicas of a stage alike), supervisor (of a local mesh) and
operator (whoever administrates). Parts of another mesh are strangers, whoever certified them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from core.errors import InvalidInput, PermissionDenied

TRUST_DOMAIN = "penstock"
DNS_SUFFIX = "penstock.internal"
COORDINATOR, GATEWAY = "coordinator", "gateway"
OPERATOR, SUPERVISOR = "operator", "supervisor"
STAGE = "stage"

_ROLE = re.compile(r"coordinator|gateway|operator|supervisor|stage/(0|[1-9][0-9]{0,3})")
_MESH = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_CERTIFICATE = "x509_pem_cert"  # where gRPC has the peer's
_SPIFFE_ID = "peer_spiffe_id"  # where gRPC has it, if the peer's certificate has exactly one URI

_STAGE_BEFORE = "the stage before"
_ANYONE = "anyone of the mesh"
# Who may call a service, or one method of it. Whatever is not here is for nobody.
_CALLERS: Mapping[str, tuple[str, ...]] = {
    "penstock.v1.StageService": (COORDINATOR,),
    "penstock.v1.StageService/Activate": (_STAGE_BEFORE,),
    "penstock.v1.CoordinatorService": (OPERATOR, SUPERVISOR),
    "penstock.v1.CoordinatorService/Connect": (GATEWAY,),
    "penstock.v1.SupervisorService": (OPERATOR,),
    "grpc.health.v1.Health": (_ANYONE,),
    "grpc.reflection.v1alpha.ServerReflection": (_ANYONE,),
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A role in a mesh."""

    mesh: str
    role: str

    def __post_init__(self) -> None:
        if not _MESH.fullmatch(self.mesh):
            raise InvalidInput("mesh", self.mesh, "lower-case letters, digits and hyphens inside")
        if not _ROLE.fullmatch(self.role):
            allowed = f"{GATEWAY}, {COORDINATOR}, {SUPERVISOR}, {OPERATOR} or stage/N"
            raise InvalidInput("role", self.role, allowed)

    @staticmethod
    def from_uri(uri: str) -> Identity:
        """Reads what `uri` wrote; raises InvalidInput."""
        prefix = f"spiffe://{TRUST_DOMAIN}/"
        mesh, _, role = uri.removeprefix(prefix).partition("/")
        if not uri.startswith(prefix):
            raise InvalidInput("identity", uri, f"{prefix}MESH/ROLE")
        return Identity(mesh=mesh, role=role)

    @property
    def uri(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/{self.mesh}/{self.role}"

    @property
    def name(self) -> str:
        return name_of(self.role)

    @property
    def dns_name(self) -> str:
        """Belongs to no machine: clients ask for it whatever the address."""
        return f"{self.name}.{self.mesh}.{DNS_SUFFIX}"

    @property
    def kind(self) -> str:
        """The role without its number."""
        return self.role.partition("/")[0]

    @property
    def stage_index(self) -> int | None:
        """None for all but stages."""
        return int(self.role.partition("/")[2]) if self.kind == STAGE else None

    def peer(self, role: str) -> Identity:
        """Another role in the same mesh."""
        return Identity(mesh=self.mesh, role=role)


def stage_role(index: int) -> str:
    """All replicas of a stage have it."""
    return f"{STAGE}/{index}"


def name_of(role: str) -> str:
    """A role where there can be no slash, as a folder say: stage-0."""
    return role.replace("/", "-")


class CallPolicy:
    """What others may call of a process with this identity."""

    def __init__(
        self, identity: Identity, *, is_revoked: Callable[[bytes], bool] = lambda pem: False
    ) -> None:
        """`is_revoked` says whether a certificate is one that calls nothing any more."""
        self._identity = identity
        self._is_revoked = is_revoked

    def check(self, method: str, caller: Mapping[str, Sequence[bytes]]) -> None:
        """Raises PermissionDenied, or what `is_revoked` raises. `caller` is gRPC's authentication
        context of the call, whose certificates have been verified by then."""
        uri = b"".join(caller.get(_SPIFFE_ID, ())).decode(errors="replace")
        role = self._role_of(uri)
        allowed = self.callers(method)
        if role is None or (role not in allowed and _ANYONE not in allowed):
            raise PermissionDenied(
                f"{method.removeprefix('/')} of {self._identity.uri} is for "
                f"{' and '.join(allowed) or 'nobody'}; the caller is {uri or 'without a name'}"
            )
        if self._is_revoked(b"".join(caller.get(_CERTIFICATE, ()))):
            raise PermissionDenied(f"the certificate that {uri} shows has been revoked")

    def callers(self, method: str) -> tuple[str, ...]:
        """The roles that may call `/service/method`."""
        name = method.removeprefix("/")
        service, _, _ = name.partition("/")
        return tuple(
            self._stage_before() if role == _STAGE_BEFORE else role
            for role in _CALLERS.get(name, _CALLERS.get(service, ()))
            if role != _STAGE_BEFORE or self._identity.stage_index
        )

    def _stage_before(self) -> str:
        assert self._identity.stage_index, "the first stage has none before it"
        return stage_role(self._identity.stage_index - 1)

    def _role_of(self, uri: str) -> str | None:
        """The caller's role in this mesh; None for strangers."""
        try:
            identity = Identity.from_uri(uri)
        except InvalidInput:
            return None
        return identity.role if identity.mesh == self._identity.mesh else None
