"""Who gets in: every public RPC asks for a key, and gives away nothing to those without one."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from oip import grpc_service_pb2 as oip
from penstock.v1 import generation_pb2 as pb

from core.tokens.tokenizer import Tokenizer
from services.common.audit_check import read_lines, verify
from services.common.data_folder import AUDIT_NAME, STORE_NAME
from services.common.keys import SCOPES, as_metadata
from services.common.store import Store
from services.gateway.access import SCOPE_OF
from services.gateway.settings import GatewaySettings
from tests.services.gateway.conftest import (
    KeyedSetup,
    Setup,
    read_all,
    refusal_of,
    running_gateway,
)
from tests.services.gateway.test_inference import infer_request
from tests.support.fake_coordinator import tokens

SERVICES = (
    pb.DESCRIPTOR.services_by_name["GenerationService"],
    oip.DESCRIPTOR.services_by_name["GRPCInferenceService"],
)
METHODS = [f"/{service.full_name}/{one.name}" for service in SERVICES for one in service.methods]
# Those that take a stream of requests.
_STREAMED: dict[str, type[Any]] = {
    "ModelStreamInfer": oip.ModelInferRequest,
    "GenerateMany": pb.GenerateManyRequest,
}
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED


def call(setup: Setup, method: str, key: str | None) -> Any:
    """Calls a public method with an empty request."""
    name = method.rpartition("/")[2]
    stub = setup.generation if "Generation" in method else setup.inference
    if name in _STREAMED:
        requests = iter([_STREAMED[name]()])
        return getattr(stub, name)(requests, timeout=30, metadata=as_metadata(key))
    request = getattr(pb if "Generation" in method else oip, request_name(name))()
    return getattr(stub, name)(request, timeout=30, metadata=as_metadata(key))


def request_name(name: str) -> str:
    return f"{name}Request"


def test_every_public_method_has_a_scope() -> None:
    assert set(SCOPE_OF) == set(METHODS)
    assert set(SCOPE_OF.values()) == set(SCOPES)


@pytest.mark.parametrize("method", METHODS)
async def test_no_method_answers_without_a_key(keyed: KeyedSetup, method: str) -> None:
    error = await refusal_of(call(keyed.setup, method, None))
    assert error.code() is UNAUTHENTICATED


@pytest.mark.parametrize("method", METHODS)
async def test_no_method_answers_a_key_of_all_other_scopes(keyed: KeyedSetup, method: str) -> None:
    key = keyed.make_key(scopes=frozenset(SCOPES) - {SCOPE_OF[method]})
    error = await refusal_of(call(keyed.setup, method, key))
    assert error.code() is PERMISSION_DENIED
    assert method in error.details()


@pytest.mark.parametrize("method", METHODS)
async def test_its_scope_lets_a_key_through_to_the_method(keyed: KeyedSetup, method: str) -> None:
    key = keyed.make_key(scopes=frozenset({SCOPE_OF[method]}))
    answering = call(keyed.setup, method, key)
    with suppress(grpc.aio.AioRpcError):  # the request is empty
        await (read_all(answering) if hasattr(answering, "__aiter__") else answering)
    assert await answering.code() not in (UNAUTHENTICATED, PERMISSION_DENIED)


async def test_health_and_reflection_need_no_key(keyed: KeyedSetup) -> None:
    await keyed.setup.wait_for_health(1)
    stub = reflection_pb2_grpc.ServerReflectionStub(keyed.setup.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = await read_all(stub.ServerReflectionInfo(iter([request]), timeout=30))
    assert listed.list_services_response.service


async def test_a_key_generates(keyed: KeyedSetup) -> None:
    responses = await read_all(keyed.generate(keyed.make_key()))
    assert "".join(response.text for response in responses) == "hello"


@pytest.mark.parametrize("how", ["another secret", "unknown id", "no key", "two keys", "basic"])
async def test_what_is_no_key_is_refused_and_told_nothing(keyed: KeyedSetup, how: str) -> None:
    key = keyed.make_key()
    shown: list[tuple[str, str]] = {
        "another secret": [("authorization", f"Bearer {key[:-1]}{'1' if key[-1] == '0' else '0'}")],
        "unknown id": [("authorization", "Bearer penstock_" + "0" * 16 + key[-65:])],
        "no key": [("authorization", "Bearer hello")],
        "two keys": [("authorization", f"Bearer {key}")] * 2,
        "basic": [("authorization", f"Basic {key}")],
    }[how]
    error = await refusal_of(keyed.generate(None, *shown))
    assert error.code() is UNAUTHENTICATED
    assert key[-64:] not in error.details()
    if how in ("another secret", "unknown id"):
        assert error.details() == "the API key is unknown"


async def test_a_key_counts_until_it_expires(keyed: KeyedSetup) -> None:
    over, later = (keyed.make_key(expires_at_s=time.time() + after_s) for after_s in (0, 600))
    error = await refusal_of(keyed.generate(over))
    assert error.code() is UNAUTHENTICATED
    assert "expired" in error.details()
    assert await read_all(keyed.generate(later))


async def test_a_revoked_key_is_refused_without_a_restart(keyed: KeyedSetup) -> None:
    key = keyed.make_key()
    assert await read_all(keyed.generate(key))
    keyed.store.revoke_key(key.split("_")[1], now_s=time.time())
    error = await until_refused(keyed, key)
    assert error.code() is UNAUTHENTICATED
    assert "revoked" in error.details()


async def until_refused(keyed: KeyedSetup, key: str) -> grpc.aio.AioRpcError:
    async with asyncio.timeout(30):
        while True:
            try:
                await read_all(keyed.generate(key))
            except grpc.aio.AioRpcError as error:
                return error


async def test_a_stream_that_was_open_before_answers_nothing_after_a_revocation(
    keyed: KeyedSetup,
) -> None:
    key = keyed.make_key()
    stream = keyed.setup.inference.ModelStreamInfer(timeout=60, metadata=as_metadata(key))
    await stream.write(infer_request("hello"))
    assert not (await stream.read()).error_message
    keyed.store.revoke_key(key.split("_")[1], now_s=time.time())
    await until_refused(keyed, key)
    num_submitted = len(keyed.setup.coordinator.submissions)
    await stream.write(infer_request("hello"))
    assert "revoked" in (await stream.read()).error_message
    assert len(keyed.setup.coordinator.submissions) == num_submitted
    stream.cancel()


async def test_keys_for_other_models_neither_use_nor_list_this_one(keyed: KeyedSetup) -> None:
    stub, inference = keyed.setup.generation, keyed.setup.inference
    other = as_metadata(keyed.make_key(models=frozenset({"another"})))
    own = as_metadata(keyed.make_key(models=frozenset({"another", "tiny"})))
    listed = await stub.ListModels(pb.ListModelsRequest(), metadata=other)
    assert not listed.models
    listed = await stub.ListModels(pb.ListModelsRequest(), metadata=own)
    assert [model.name for model in listed.models] == ["tiny"]
    ready = oip.ModelReadyRequest(name="tiny")
    assert (await inference.ModelReady(ready, metadata=own)).ready
    calls = [
        *(stub.Generate(pb.GenerateRequest(prompt="a", model=m), metadata=other) for m in names()),
        *(stub.Tokenize(pb.TokenizeRequest(prompt="a", model=m), metadata=other) for m in names()),
        *(stub.Detokenize(pb.DetokenizeRequest(model=m), metadata=other) for m in names()),
        inference.ModelReady(ready, metadata=other),
        inference.ModelMetadata(oip.ModelMetadataRequest(name="tiny"), metadata=other),
        inference.ModelInfer(infer_request("a"), metadata=other),
    ]
    for one in calls:
        assert (await refusal_of(one)).code() is PERMISSION_DENIED
    (answer,) = await read_all(
        inference.ModelStreamInfer(iter([infer_request("a")]), metadata=other)
    )
    assert "does not allow the model 'tiny'" in answer.error_message
    assert not keyed.setup.coordinator.submissions


def names() -> tuple[str, str]:
    """What a client may call the only model."""
    return "", "tiny"


async def test_a_store_that_cannot_be_read_lets_nobody_in(keyed: KeyedSetup) -> None:
    key = keyed.make_key()
    (keyed.data_folder / STORE_NAME).write_bytes(b"no database" * 1000)
    error = await refusal_of(keyed.generate(key))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert str(keyed.data_folder) not in error.details()


async def test_two_gateways_share_a_store(keyed: KeyedSetup, tokenizer: Tokenizer) -> None:
    folder = keyed.data_folder
    async with running_gateway(tokenizer, require_keys=True, data_folder=folder) as second:
        key = keyed.make_key()
        for setup in (keyed.setup, second):
            request = pb.GenerateRequest(prompt="hello")
            assert await read_all(setup.generation.Generate(request, metadata=as_metadata(key)))
        salts = {setup.coordinator.submissions[-1].cache_salt for setup in (keyed.setup, second)}
        assert len(salts) == 1


async def test_refusals_are_in_the_audit_log_without_a_secret_and_not_one_by_one(
    keyed: KeyedSetup,
) -> None:
    key = keyed.make_key()
    wrong = key[:-8] + "00000000"
    for _ in range(20):
        await refusal_of(keyed.generate(wrong))
    await keyed.setup.gateway.close()
    path = keyed.data_folder / AUDIT_NAME
    (line,) = read_lines(path)
    assert (line.event, line.actor) == ("access refused", "gateway")
    assert line.details["why"] == "the API key is unknown"
    assert str(line.details["peer"]).startswith("ipv4:127.0.0.1:")
    assert wrong[-64:] not in path.read_text()
    verify(path)


async def test_the_log_and_the_store_hold_no_secret(
    keyed: KeyedSetup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    key = keyed.make_key()
    await read_all(keyed.generate(key))
    await refusal_of(keyed.generate(key, model="other"))
    secret = key.rpartition("_")[2]
    assert secret not in caplog.text + "".join(str(vars(one)) for one in caplog.records)
    assert secret.encode() not in (keyed.data_folder / STORE_NAME).read_bytes()
    assert bytes.fromhex(secret) not in (keyed.data_folder / STORE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("listen", "asked", "required"),
    [
        ("127.0.0.1:1", None, False),
        ("[::1]:1", None, False),
        ("localhost:1", None, False),
        ("0.0.0.0:1", None, True),
        ("[::]:1", None, True),
        ("10.0.0.1:1", None, True),
        ("127.0.0.1:1", True, True),
        ("0.0.0.0:1", False, False),
    ],
)
def test_keys_are_required_beyond_loopback_and_wherever_they_are_asked_for(
    listen: str, asked: bool | None, required: bool
) -> None:
    settings = GatewaySettings(
        coordinators=("a:1",), model=Path("m"), listen=listen, require_keys=asked
    )
    assert settings.requires_keys is required


async def test_without_keys_a_key_that_is_sent_changes_nothing(setup: Setup) -> None:
    setup.coordinator.script = lambda _: [tokens(65)]
    request = pb.ListModelsRequest()
    metadata = (("authorization", "Bearer anything"),)
    assert (await setup.generation.ListModels(request, metadata=metadata)).models


def test_a_store_is_for_its_owner_only(tmp_path: Path) -> None:
    Store(tmp_path / "data" / STORE_NAME).close()
    paths = (tmp_path / "data", tmp_path / "data" / STORE_NAME)
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o700, 0o600]
