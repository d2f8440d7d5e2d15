"""Servers: errors become statuses, bad bytes are refused, a taken port is one clear line."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from io import StringIO
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from penstock.v1 import generation_pb2, generation_pb2_grpc

from core import errors
from services.common.channels import open_channel
from services.common.health import HealthService, add_reflection
from services.common.logs import JsonFormatter
from services.common.servers import bind, create_server
from services.common.statuses import _TABLE, error_from_rpc
from services.common.telemetry import Telemetry, no_telemetry, start_telemetry
from tests.support.metrics import scrape


class Raising(generation_pb2_grpc.GenerationServiceServicer):
    """Raises `error` from every method, or serves when it is None."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def ListModels(self, request: Any, context: Any) -> Any:
        if self.error is not None:
            raise self.error
        return generation_pb2.ListModelsResponse()

    async def Tokenize(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.ABORTED, "by the handler itself")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield generation_pb2.GenerateResponse(text="first")
        if self.error is not None:
            raise self.error
        yield generation_pb2.GenerateResponse(text="second")


@asynccontextmanager
async def serving(
    error: Exception | None, *, telemetry: Telemetry | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    server = create_server(telemetry or no_telemetry(), max_receive_bytes=1000)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Raising(error), server)
    port = bind(server, "127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def failure_of(error: Exception) -> grpc.aio.AioRpcError:
    async with serving(error) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ListModels(generation_pb2.ListModelsRequest(), timeout=10)
    return raised.value


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidInput("sampling.top_p", 7, "(0, 1]"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.NotFound("no model x", field="model"), grpc.StatusCode.NOT_FOUND),
        (errors.NotFound("no file x"), grpc.StatusCode.NOT_FOUND),
        (errors.Exhausted("full", retry_after_s=1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (
            errors.Exhausted("yours", retry_after_s=1.5, subject="key 1"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
        (errors.Unauthenticated("who are you"), grpc.StatusCode.UNAUTHENTICATED),
        (errors.PermissionDenied("not you"), grpc.StatusCode.PERMISSION_DENIED),
        (errors.CorruptLog("line 3"), grpc.StatusCode.DATA_LOSS),
        (errors.Exhausted("too long"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Unavailable("stage 1 is down"), grpc.StatusCode.UNAVAILABLE),
        (errors.DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.CorruptWeights("cut short"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.PlanImpossible("no room"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.ProtocolViolation("not opened"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.MalformedMessage("bad shape"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.ChecksumMismatch("bits"), grpc.StatusCode.DATA_LOSS),
    ],
)
async def test_errors_cross_the_wire_and_come_back_as_the_same_class(
    error: errors.PenstockError, code: grpc.StatusCode
) -> None:
    failure = await failure_of(error)
    assert failure.code() is code
    assert failure.details() == str(error)
    back = error_from_rpc(failure)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_every_error_class_has_a_row_of_its_own() -> None:
    classes = {one for one in vars(errors).values() if isinstance(one, type)}
    assert {row.error for row in _TABLE} == classes


async def test_invalid_input_names_field_value_and_what_is_allowed() -> None:
    failure = await failure_of(errors.InvalidInput("sampling.temperature", -1.0, "0 to 100"))
    status = rpc_status.from_call(failure)
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    violation = bad_request.field_violations[0]
    assert violation.field == "sampling.temperature"
    assert "-1.0" in violation.description
    assert "0 to 100" in violation.description


async def test_an_unexpected_exception_shows_only_an_id_that_the_log_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failure = await failure_of(RuntimeError("the secret path /etc/x"))
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (failure.details() or "")
    record = next(record for record in caplog.records if record.message == "rpc failed")
    assert record.error_id in (failure.details() or "")  # type: ignore[attr-defined]
    assert record.exc_info is not None
    assert "secret" in str(record.exc_info[1])


@pytest.mark.parametrize("error", [errors.NotFound("no model"), RuntimeError("our bug")])
async def test_the_log_of_a_failure_has_the_callers_trace_id_though_nothing_is_traced(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    metadata = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)
    async with serving(error) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ListModels(generation_pb2.ListModelsRequest(), metadata=metadata)
    record = next(record for record in caplog.records if record.message.startswith("rpc "))
    assert record.trace_id == trace_id  # type: ignore[attr-defined]


async def test_an_error_in_the_middle_of_a_stream_ends_it_with_its_status() -> None:
    async with serving(errors.Unavailable("stage 1 is down", retry_after_s=2)) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generation_pb2.GenerateRequest(), timeout=10)
        assert (await call.read()).text == "first"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_peer_that_has_gone_is_no_failure_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def write_on(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                with suppress(asyncio.CancelledError):  # comes once, whatever it interrupts
                    await anext(requests, None)
                    await context.write(b"too late")
        except BaseException as error:
            ended.set_result(error)
            raise
        yield b"never"

    server = create_server(no_telemetry())
    method = grpc.stream_stream_rpc_method_handler(write_on)
    handler = grpc.method_handlers_generic_handler("service", {"Method": method})
    server.add_generic_rpc_handlers((handler,))
    port = bind(server, "127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream("/service/Method")()
        await call.write(b"hello")
        call.cancel()
        assert isinstance(await asyncio.wait_for(ended, 20), grpc.aio.InternalError)
    await server.stop(None)
    # gRPC's one poller for all loops of a process may find an operation of an earlier test's.
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert not [error for error in errors if "PollerCompletionQueue" not in error]


async def test_a_status_that_a_handler_chose_itself_stays() -> None:
    async with serving(None) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Tokenize(generation_pb2.TokenizeRequest(), timeout=10)
    assert raised.value.code() is grpc.StatusCode.ABORTED
    assert raised.value.details() == "by the handler itself"


@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xfe", b"\x0a\x7fcut"], ids=["utf-8", "cut"])
@pytest.mark.parametrize("method", ["Tokenize", "Generate"])
async def test_undecodable_requests_get_invalid_argument(method: str, data: bytes) -> None:
    async with serving(None) as channel:
        path = f"/penstock.v1.GenerationService/{method}"
        unary = method == "Tokenize"
        call = channel.unary_unary(path) if unary else channel.unary_stream(path)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (call(data, timeout=10) if unary else call(data, timeout=10).read())
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error_from_rpc(raised.value), errors.InvalidInput)


async def test_an_oversized_message_is_refused_and_the_server_goes_on() -> None:
    async with serving(None) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Tokenize(generation_pb2.TokenizeRequest(prompt="x" * 5000), timeout=10)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await stub.ListModels(generation_pb2.ListModelsRequest(), timeout=10) is not None


async def test_a_taken_port_is_one_clear_error() -> None:
    first, second = create_server(no_telemetry()), create_server(no_telemetry())
    port = bind(first, "127.0.0.1:0")
    with pytest.raises(errors.InvalidInput, match=f"listen is '127.0.0.1:{port}'.*free port"):
        bind(second, f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["8001", "host", "127.0.0.1:http", "127.0.0.1:70000", ""])
async def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(errors.InvalidInput, match="host:port"):
        bind(create_server(no_telemetry()), address)


async def test_health_knows_its_names_and_no_others() -> None:
    server = create_server(no_telemetry())
    health = HealthService(["tiny", "tiny/stage/0"])
    await health.add_to(server)
    add_reflection(
        server, services=[generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]]
    )
    port = bind(server, "127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(name: str) -> Any:
            return (
                await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            ).status

        watch = stub.Watch(health_pb2.HealthCheckRequest(service="tiny"), timeout=10)
        serving_status = health_pb2.HealthCheckResponse.ServingStatus
        assert (await watch.read()).status == serving_status.NOT_SERVING
        await health.set("tiny", serving=True)
        assert (await watch.read()).status == serving_status.SERVING
        assert await check("tiny") == serving_status.SERVING
        assert await check("") == serving_status.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await check("other")
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        await health.stop_serving()
        assert (await watch.read()).status == serving_status.NOT_SERVING
        watch.cancel()
    await server.stop(None)


async def test_rpc_durations_are_measured_by_method_and_status() -> None:
    telemetry = start_telemetry("penstock-test", metrics_port=0, environment={})
    async with serving(errors.NotFound("no"), telemetry=telemetry) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ListModels(generation_pb2.ListModelsRequest(), timeout=10)
    samples = scrape(telemetry.metrics_port)
    telemetry.shutdown()
    labels = {
        "rpc_method": "penstock.v1.GenerationService/ListModels",
        "rpc_response_status_code": "NOT_FOUND",
        "rpc_system_name": "grpc",
    }
    assert samples.value("rpc_server_call_duration_seconds_count", labels) == 1


def test_a_log_line_is_one_json_object_with_its_facts() -> None:
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("stage-0"))
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "INFO", "msg": "two\nlines", "layers": "0:15"}
    )
    handler.emit(record)
    (line,) = stream.getvalue().splitlines()
    parsed = json.loads(line)
    assert parsed["message"] == "two\nlines"
    assert parsed["service"] == "stage-0"
    assert parsed["layers"] == "0:15"
