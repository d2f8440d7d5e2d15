"""What clients call things: in logs, as paths, and what they may ask for by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from oip import grpc_service_pb2 as oip
from penstock.v1 import generation_pb2 as pb

from core.errors import NotFound
from services.common.logs import JsonFormatter, PeopleFormatter
from services.local.fetch import resolve_model
from services.local.run_folder import RunFolder
from tests.services.gateway.conftest import Setup

FORGED = 'x\n{"level": "INFO", "message": "all is well"}\r\x1b[2J\x9b31m\u2028\u202etxt'
PATHS = ["../../etc/passwd", "/etc/passwd", "..", "~/.ssh/id_rsa", "file:///etc/passwd", "a\0b"]
INTERNAL = [
    "penstock.v1.CoordinatorService/GetMesh",
    "penstock.v1.CoordinatorService/AddReplica",
    "penstock.v1.StageService/Control",
    "penstock.v1.StageService/Activate",
    "penstock.v1.SupervisorService/StopReplica",
]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("make", [JsonFormatter, PeopleFormatter])
async def test_a_name_cannot_forge_a_line_of_the_log(
    setup: Setup, caplog: pytest.LogCaptureFixture, make: Callable[[str], logging.Formatter]
) -> None:
    caplog.set_level(logging.INFO)
    await refusal(setup.generation.Tokenize(pb.TokenizeRequest(model=FORGED, prompt="a")))
    (record,) = [record for record in caplog.records if record.message == "rpc refused"]
    for name in ("why", "method"):  # and were it not escaped before
        setattr(record, name, f"{getattr(record, name)} {FORGED}")
    line = make("gateway").format(record)
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    if make is JsonFormatter:
        assert json.loads(line)["message"] == "rpc refused"


async def test_a_name_of_a_megabyte_is_short_in_the_status_and_in_the_log(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = "x" * 1_000_000
    error = await refusal(setup.generation.Tokenize(pb.TokenizeRequest(model=name, prompt="a")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert len(error.details() or "") < 500
    assert all(len(JsonFormatter("gateway").format(record)) < 2000 for record in caplog.records)


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_in_place_of_a_models_name_is_not_found(setup: Setup, path: str) -> None:
    requests = [
        setup.generation.Tokenize(pb.TokenizeRequest(model=path, prompt="a")),
        setup.inference.ModelInfer(oip.ModelInferRequest(model_name=path)),
        setup.inference.ModelMetadata(oip.ModelMetadataRequest(name=path)),
    ]
    for request in requests:
        error = await refusal(request)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "root:" not in (error.details() or "")


@pytest.mark.parametrize("spec", ["../nothing/here", "a/../../etc/nothing", "..", "a/b/c/d", ""])
def test_a_models_name_that_is_no_path_that_exists_never_becomes_one(
    spec: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if spec == "..":  # it exists; whether it is a model is for its reader to say
        assert resolve_model(spec).is_dir()
        return
    with pytest.raises(NotFound):
        resolve_model(spec)


async def test_reflection_at_the_gateway_lists_only_what_is_for_clients(setup: Setup) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(setup.channel)
    call = stub.ServerReflectionInfo(timeout=60)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {service.name for service in (await call.read()).list_services_response.service}
    await call.done_writing()
    assert listed == {
        "penstock.v1.GenerationService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("method", INTERNAL)
async def test_what_is_for_the_parts_of_the_mesh_is_not_at_the_gateway(
    setup: Setup, method: str
) -> None:
    error = await refusal(setup.channel.unary_unary(f"/{method}")(b"", timeout=60))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_supervisors_folder_is_for_its_user_alone(tmp_path: Any) -> None:
    run_folder = RunFolder(tmp_path / "run")
    with run_folder.claim():
        assert run_folder.path.stat().st_mode & 0o077 == 0
