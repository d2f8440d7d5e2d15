"""A whole mesh whose parts prove who they are, as it is started by hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from penstock.v1 import coordinator_pb2
from penstock.v1 import generation_pb2 as pb
from penstock.v1.coordinator_pb2_grpc import CoordinatorServiceStub

from services.common.certificates import issue
from services.common.credentials import Credentials
from tests.support.client import Client, connect, connect_securely, make_request
from tests.support.local_mesh import LocalMesh
from tests.support.models import TinyModel, write_servable

OPTIONS = ("--split", "0:2,2:4", "--kv-memory", "8MiB", "--dtype", "bf16")
REQUESTS = [
    make_request(
        token_ids=[5, 6, 7 + number],
        sampling={"temperature": float(number % 2), "seed": number, "max_tokens": 24},
    )
    for number in range(8)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_servable(tmp_path_factory.mktemp("model"), TinyModel())


@contextmanager
def started(runtime: Path, model: Path, *options: str) -> Iterator[LocalMesh]:
    mesh = LocalMesh(runtime=runtime, environment={})
    mesh.start("--model", str(model), *OPTIONS, *options)
    try:
        yield mesh
    finally:
        mesh.stop()


@contextmanager
def connected(mesh: LocalMesh) -> Iterator[Client]:
    record = mesh.record
    with connect_securely(
        gateway=record.gateway, coordinator=record.coordinators[0], certs=Path(record.certs)
    ) as client:
        yield client


@pytest.fixture(scope="module")
def mesh(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """All that its parts say goes over mTLS, as it does between machines."""
    options = ("--certs", "auto", "--no-shortcuts")
    with started(tmp_path_factory.mktemp("mesh"), model, *options) as mesh:
        yield mesh


@pytest.fixture
def client(mesh: LocalMesh) -> Iterator[Client]:
    with connected(mesh) as client:
        yield client


def tokens(client: Client) -> list[list[int]]:
    return [answer.token_ids for answer in client.send_all(REQUESTS)]


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The answers of the same mesh without certificates."""
    with started(tmp_path_factory.mktemp("plain"), model) as mesh:
        record = mesh.record
        with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
            return tokens(client)


def test_the_answers_are_those_of_a_mesh_without(client: Client, plain: list[list[int]]) -> None:
    assert tokens(client) == plain


def test_nor_do_they_change_where_sockets_stand_beside_the_streams(
    model: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    with started(tmp_path, model, "--certs", "auto") as mesh, connected(mesh) as client:
        assert tokens(client) == plain


def test_the_commands_find_the_mesh_and_its_certificates(mesh: LocalMesh) -> None:
    status = mesh.run("status")
    assert status.returncode == 0, status.stderr
    assert status.stdout.count(" ready ") == 2
    answer = mesh.run("generate", "--raw", "--max-tokens", "4", "--usage", "Once")
    assert answer.returncode == 0, answer.stderr
    assert "4 completion tokens" in answer.stderr


def test_a_client_elsewhere_names_the_authority(mesh: LocalMesh, tmp_path: Path) -> None:
    elsewhere = LocalMesh(runtime=tmp_path, environment={})
    authority = str(Path(mesh.record.certs) / "ca.pem")
    ask = ("generate", "--raw", "--max-tokens", "4", "--address", mesh.address, "Once")
    assert elsewhere.run(*ask).returncode == 1
    assert elsewhere.run(*ask, "--ca", authority).returncode == 0


def test_without_the_operators_certificate_nobody_administrates(mesh: LocalMesh) -> None:
    record = mesh.record
    with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
        with pytest.raises(grpc.RpcError):
            client.mesh()
        with pytest.raises(grpc.RpcError):
            client.generation.ListModels(pb.ListModelsRequest(), timeout=10)
    gateway = Credentials(Path(record.certs) / "gateway")
    name = gateway.identity.peer("coordinator").dns_name
    options = [("grpc.ssl_target_name_override", name)]
    with grpc.secure_channel(
        record.coordinators[0], gateway.of_channel(), options=options
    ) as channel:
        drain = coordinator_pb2.DrainReplicaRequest(address="127.0.0.1:1")
        with pytest.raises(grpc.RpcError) as raised:
            next(iter(CoordinatorServiceStub(channel).DrainReplica(drain, timeout=10)))
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_identities_are_renewed_while_the_mesh_serves(
    mesh: LocalMesh, client: Client, plain: list[list[int]]
) -> None:
    certs = Path(mesh.record.certs)
    for role in ("coordinator", "stage/0", "stage/1"):
        issue(certs, role)
    (stage_1,) = [one for one in mesh.record.processes if one.name == "stage-1"]
    os.kill(stage_1.pid, signal.SIGKILL)  # its successor is dialled anew by both of its neighbours
    assert tokens(client) == plain
