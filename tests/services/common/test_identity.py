"""Who may call whom, by what certificates say."""

from __future__ import annotations

from pathlib import Path

import pytest
from penstock.v1 import coordinator_pb2, local_pb2, stage_pb2

from core.errors import InvalidInput, PermissionDenied
from services.common.identity import CallPolicy, Identity

STAGE_1 = CallPolicy(Identity(mesh="m", role="stage/1"))
COORDINATOR = CallPolicy(Identity(mesh="m", role="coordinator"))
SUPERVISOR = CallPolicy(Identity(mesh="m", role="supervisor"))
CONTROL, ACTIVATE = "/penstock.v1.StageService/Control", "/penstock.v1.StageService/Activate"
CONNECT = "/penstock.v1.CoordinatorService/Connect"
GET_MESH = "/penstock.v1.CoordinatorService/GetMesh"
DRAIN = "/penstock.v1.CoordinatorService/DrainReplica"
TRY_REPLICA = "/penstock.v1.SupervisorService/TryReplica"
ALL = ("gateway", "coordinator", "operator", "supervisor", "stage/0", "stage/1", "stage/2")


def caller(role: str, *, mesh: str = "m") -> dict[str, list[bytes]]:
    return {"peer_spiffe_id": [Identity(mesh=mesh, role=role).uri.encode()]}


def may_call(policy: CallPolicy, method: str, who: dict[str, list[bytes]]) -> bool:
    try:
        policy.check(method, who)
    except PermissionDenied:
        return False
    return True


@pytest.mark.parametrize(
    ("policy", "method", "allowed"),
    [
        (STAGE_1, CONTROL, {"coordinator"}),
        (STAGE_1, ACTIVATE, {"stage/0"}),
        (COORDINATOR, CONNECT, {"gateway"}),
        (COORDINATOR, GET_MESH, {"operator", "supervisor"}),
        (COORDINATOR, DRAIN, {"operator", "supervisor"}),
        (SUPERVISOR, TRY_REPLICA, {"operator"}),
        (STAGE_1, "/grpc.health.v1.Health/Check", set(ALL)),
        (
            COORDINATOR,
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            set(ALL),
        ),
        (COORDINATOR, "/penstock.v1.Unheard/Of", set()),
    ],
)
def test_each_method_is_for_these_roles_alone(
    policy: CallPolicy, method: str, allowed: set[str]
) -> None:
    assert {role for role in ALL if may_call(policy, method, caller(role))} == allowed


def test_nobody_sends_activations_to_the_first_stage() -> None:
    first = CallPolicy(Identity(mesh="m", role="stage/0"))
    assert not any(may_call(first, ACTIVATE, caller(role)) for role in ALL)


def test_a_part_of_another_mesh_is_a_stranger() -> None:
    assert not may_call(STAGE_1, CONTROL, caller("coordinator", mesh="other"))
    assert not may_call(
        STAGE_1, "/grpc.health.v1.Health/Check", caller("coordinator", mesh="other")
    )


@pytest.mark.parametrize(
    "uri",
    [
        b"",
        b"spiffe://elsewhere/m/coordinator",
        b"spiffe://penstock/m/coordinator/",
        b"spiffe://penstock/m/stage/01",
        b"spiffe://penstock/m/Coordinator",
        b"http://penstock/m/coordinator",
        b"\xff\xfe",
    ],
)
def test_names_that_only_look_alike_are_refused(uri: bytes) -> None:
    assert not may_call(STAGE_1, CONTROL, {"peer_spiffe_id": [uri]})


def test_without_exactly_one_name_a_caller_is_nobody() -> None:
    assert not may_call(STAGE_1, CONTROL, {})
    assert not may_call(STAGE_1, CONTROL, {"x509_common_name": [b"coordinator"]})


def test_the_refusal_says_who_may_and_who_called() -> None:
    message = (
        "penstock.v1.StageService/Activate of spiffe://penstock/m/stage/1 is for stage/0; "
        "the caller is spiffe://penstock/m/stage/2"
    )
    with pytest.raises(PermissionDenied, match=message):
        STAGE_1.check(ACTIVATE, caller("stage/2"))


def test_every_method_between_the_parts_is_for_somebody() -> None:
    files = (stage_pb2, coordinator_pb2, local_pb2)
    methods = [
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    assert len(methods) >= 10
    assert all(STAGE_1.callers(method) for method in methods)


@pytest.mark.parametrize(("mesh", "role"), [("M", "gateway"), ("m", "admin"), ("", "gateway")])
def test_what_no_certificate_can_say_is_refused(mesh: str, role: str) -> None:
    with pytest.raises(InvalidInput):
        Identity(mesh=mesh, role=role)


def test_a_name_reads_back_as_it_was_written() -> None:
    for role in ALL:
        identity = Identity(mesh="a-mesh", role=role)
        assert Identity.from_uri(identity.uri) == identity
        assert Path(identity.name).name == identity.name
