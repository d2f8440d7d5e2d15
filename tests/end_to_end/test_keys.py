"""A mesh that asks for keys, from its start to its end: nobody gets in, nobody sees another."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb
from penstock.v1.generation_pb2_grpc import GenerationServiceStub

from services.common.audit_check import read_lines, verify
from services.common.data_folder import AUDIT_NAME
from services.common.keys import as_metadata
from tests.support.client import make_request
from tests.support.local_mesh import LocalMesh

# A second is promised, from when the revocation is written; the rest is for a busy machine.
REVOKED_WITHIN_S = 1.0 + 4.0
PROMPT = "The days of the week are Monday, Tuesday, Wednesday, Thursday. " * 8


@pytest.fixture(scope="module")
def keyed_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    mesh = LocalMesh(runtime=tmp_path_factory.mktemp("keys"), environment={"PENSTOCK_KEYS": "1"})
    said = mesh.start("--kv-memory", "112MiB")
    assert "penstock keys create" in said
    yield mesh
    mesh.stop()
    path = mesh.runtime / "data" / "penstock" / AUDIT_NAME
    assert verify(path).head.sequence
    assert [line.event for line in read_lines(path)][-1] == "mesh stopped"


def create_key(mesh: LocalMesh, tenant: str) -> str:
    done = mesh.run("keys", "create", "--tenant", tenant)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cached_tokens(mesh: LocalMesh, key: str) -> int:
    """How many tokens of the prompt an answer says were computed before."""
    with grpc.insecure_channel(mesh.address) as channel:
        request = make_request(prompt=PROMPT, sampling={"max_tokens": 1, "temperature": 0.0})
        stub = GenerationServiceStub(channel)
        *_, last = stub.Generate(request, timeout=60, metadata=as_metadata(key))
        return last.usage.cached_tokens


def test_without_a_key_nothing_is_answered_and_with_one_it_is(keyed_mesh: LocalMesh) -> None:
    refused = keyed_mesh.run("generate", "Hello")
    assert refused.returncode == 1
    assert "UNAUTHENTICATED" in refused.stderr
    key = create_key(keyed_mesh, "cli")
    answered = keyed_mesh.run("generate", "Hello", "--max-tokens", "4", "--key", key)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    assert keyed_mesh.run("tokenize", "Hello", "--key", key).stdout.split()


def test_a_prompt_that_another_tenant_sent_before_is_as_new(keyed_mesh: LocalMesh) -> None:
    ours, also_ours, theirs = (create_key(keyed_mesh, tenant) for tenant in ("a", "a", "b"))
    until_known(keyed_mesh, theirs)
    assert cached_tokens(keyed_mesh, ours) == 0
    assert cached_tokens(keyed_mesh, ours) > 0
    assert cached_tokens(keyed_mesh, theirs) == 0
    assert cached_tokens(keyed_mesh, also_ours) > 0


def test_a_revoked_key_is_refused_within_a_second(keyed_mesh: LocalMesh) -> None:
    key = create_key(keyed_mesh, "short")
    until_known(keyed_mesh, key)
    revoked = keyed_mesh.run("keys", "revoke", key.split("_")[1])
    assert revoked.returncode == 0, revoked.stderr
    refusal = until_refused(keyed_mesh, key)
    assert refusal.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "is revoked" in refusal.details()


def test_what_was_done_is_in_the_audit_log(keyed_mesh: LocalMesh) -> None:
    done = keyed_mesh.run("audit", "verify")
    assert done.returncode == 0, done.stderr
    shown = keyed_mesh.run("audit", "show").stdout
    assert "mesh started" in shown


def until_refused(mesh: LocalMesh, key: str) -> grpc.RpcError:
    """Asks until the gateway refuses a key, and says how it does; fails when it never does."""
    deadline = time.monotonic() + REVOKED_WITHIN_S
    with grpc.insecure_channel(mesh.address) as channel:
        stub = GenerationServiceStub(channel)
        while time.monotonic() < deadline:
            try:
                stub.ListModels(pb.ListModelsRequest(), timeout=10, metadata=as_metadata(key))
            except grpc.RpcError as refusal:
                return refusal
            time.sleep(0.05)
    raise AssertionError(f"the key was good for {REVOKED_WITHIN_S} s after its revocation")


def until_known(mesh: LocalMesh, key: str) -> None:
    """Waits until the gateway has heard of a key."""
    with grpc.insecure_channel(mesh.address) as channel:
        stub = GenerationServiceStub(channel)
        deadline = time.monotonic() + 30
        while True:
            try:
                stub.ListModels(pb.ListModelsRequest(), timeout=10, metadata=as_metadata(key))
                return
            except grpc.RpcError:
                assert time.monotonic() < deadline, "the gateway never heard of the key"
                time.sleep(0.05)
