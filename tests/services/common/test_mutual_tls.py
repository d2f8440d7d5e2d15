"""Handshakes: who gets in, who does not, and certificates that are replaced meanwhile."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from penstock.v1 import stage_pb2, stage_pb2_grpc

from core.errors import InvalidInput, NotFound
from services.common.certificates import issue, make_authority
from services.common.channels import open_channel, open_public_channel, why_unreachable
from services.common.credentials import Credentials
from services.common.servers import bind, create_server
from services.common.telemetry import no_telemetry
from tests.support.certificates import credentials, write_mesh
from tests.support.echoing_stage import echoing_stage

TIMEOUT_S = 30.0
ROLES = ("coordinator", "gateway", "operator", "stage/0", "stage/1", "stage/2")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server with the identity of stage/1, and the folder of all identities."""

    folder: Path
    address: str

    def dial(self, who: Credentials | None, *, role: str = "stage/1") -> grpc.aio.Channel:
        return open_channel(self.address, credentials=who, role=role)


@asynccontextmanager
async def serving(folder: Path, *, is_public: bool = False) -> AsyncIterator[Served]:
    own = Credentials(folder / "stage-1")
    async with echoing_stage(own, is_public=is_public) as (_, port):
        yield Served(folder=folder, address=f"127.0.0.1:{port}")


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Served]:
    write_mesh(tmp_path, *ROLES)
    async with serving(tmp_path) as served:
        yield served


async def converse(channel: grpc.aio.Channel, method: str) -> Any:
    """The first answer of a stream."""
    stub: Any = stage_pb2_grpc.StageServiceStub(channel)
    kind = {"Control": stage_pb2.ControlRequest, "Activate": stage_pb2.ActivateRequest}[method]
    call = getattr(stub, method)(timeout=TIMEOUT_S)
    try:
        await call.write(kind())
        return await call.read()
    finally:
        call.cancel()


async def refusal(channel: grpc.aio.Channel, method: str = "Control") -> grpc.aio.AioRpcError:
    """What a stream ends with, before anything is sent: a write that comes too late hides it."""
    stub: Any = stage_pb2_grpc.StageServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub, method)(timeout=TIMEOUT_S).read()
    return raised.value


async def is_healthy(channel: grpc.aio.Channel) -> bool:
    request = health_pb2.HealthCheckRequest()
    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_the_coordinator_orders_and_the_stage_before_sends(stage: Served) -> None:
    async with stage.dial(credentials(stage.folder, "coordinator")) as channel:
        assert (await converse(channel, "Control")).HasField("report")
    async with stage.dial(credentials(stage.folder, "stage/0")) as channel:
        assert (await converse(channel, "Activate")).credits == 1


@pytest.mark.parametrize(
    ("role", "method"),
    [
        ("stage/2", "Activate"),
        ("stage/1", "Activate"),
        ("coordinator", "Activate"),
        ("gateway", "Control"),
        ("operator", "Control"),
        ("stage/0", "Control"),
    ],
)
async def test_a_stage_refuses_the_wrong_identity(stage: Served, role: str, method: str) -> None:
    async with stage.dial(credentials(stage.folder, role)) as channel:
        error = await refusal(channel, method)
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert f"the caller is spiffe://penstock/test/{role}" in str(error.details())
        assert await is_healthy(channel)


async def test_without_a_certificate_there_is_no_handshake(stage: Served) -> None:
    authority = stage.folder / "ca.pem"
    for channel in (open_public_channel(stage.address, ca=authority), open_channel(stage.address)):
        async with channel:
            assert (await refusal(channel)).code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError):
                await is_healthy(channel)


async def test_a_certificate_of_another_authority_is_refused(stage: Served, tmp_path: Path) -> None:
    write_mesh(tmp_path / "own", "coordinator")
    forged = tmp_path / "own" / "coordinator"
    trust(stage.folder / "ca.pem", by=forged)
    async with stage.dial(Credentials(forged)) as channel:
        assert (await refusal(channel)).code() is grpc.StatusCode.UNAVAILABLE


async def test_an_expired_certificate_is_refused(stage: Served) -> None:
    coordinator = credentials(stage.folder, "coordinator")
    issue(stage.folder, "coordinator", days=0)
    files = [
        (stage.folder / "coordinator" / name).read_bytes()
        for name in ("ca.pem", "key.pem", "cert.pem")
    ]
    name = [("grpc.ssl_target_name_override", coordinator.identity.peer("stage/1").dns_name)]
    expired = grpc.ssl_channel_credentials(*files)
    async with grpc.aio.secure_channel(stage.address, expired, options=name) as channel:
        assert (await refusal(channel)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_part_of_another_mesh_is_refused_even_where_its_authority_is_trusted(
    stage: Served, tmp_path: Path
) -> None:
    write_mesh(tmp_path / "other", "coordinator", mesh="other")
    trust(tmp_path / "other" / "ca.pem", by=stage.folder / "stage-1")
    trust(stage.folder / "ca.pem", by=tmp_path / "other" / "coordinator")
    other = Credentials(tmp_path / "other" / "coordinator").of_channel()
    name = [("grpc.ssl_target_name_override", "stage-1.test.penstock.internal")]
    async with grpc.aio.secure_channel(stage.address, other, options=name) as channel:
        error = await refusal(channel)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "spiffe://penstock/other/coordinator" in str(error.details())


async def test_who_dials_turns_away_from_a_server_of_another_role(stage: Served) -> None:
    async with stage.dial(credentials(stage.folder, "coordinator"), role="stage/2") as channel:
        error = await refusal(channel)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "Hostname Verification" in str(error.details())


async def test_why_a_peer_cannot_be_reached_can_be_asked(stage: Served) -> None:
    coordinator = credentials(stage.folder, "coordinator")
    async with stage.dial(coordinator, role="stage/2") as channel:
        assert "Hostname Verification" in await why_unreachable(channel)
    async with stage.dial(coordinator) as channel:
        assert await why_unreachable(channel) == ""


async def test_clients_of_a_public_port_need_no_certificate(tmp_path: Path) -> None:
    write_mesh(tmp_path, "stage/1")
    async with serving(tmp_path, is_public=True) as served:
        async with open_public_channel(served.address, ca=tmp_path / "ca.pem") as channel:
            assert await is_healthy(channel)
        write_mesh(tmp_path / "other")
        async with open_public_channel(served.address, ca=tmp_path / "other/ca.pem") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await is_healthy(channel)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_without_the_authorities_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"ca.pem cannot be read"):
        open_public_channel("127.0.0.1:1", ca=tmp_path / "ca.pem")


async def test_a_renewed_certificate_is_shown_without_a_restart_and_streams_go_on(
    stage: Served,
) -> None:
    async with stage.dial(credentials(stage.folder, "coordinator")) as channel:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        call = stub.Control(timeout=TIMEOUT_S)
        await call.write(stage_pb2.ControlRequest())
        await call.read()
        before = await serial_shown(stage)
        assert before == serial_written(stage)
        issue(stage.folder, "stage/1")
        assert await serial_shown(stage) == serial_written(stage) != before
        await call.write(stage_pb2.ControlRequest())
        assert (await call.read()).HasField("report")


async def test_a_channel_opened_later_shows_the_renewed_certificate(stage: Served) -> None:
    """A new authority replaces the old one on both sides: only new files still pass."""
    coordinator = credentials(stage.folder, "coordinator")
    make_authority(stage.folder, mesh="test", replaces=True)
    issue(stage.folder, "stage/1")
    async with stage.dial(coordinator) as channel:
        assert (await refusal(channel)).code() is grpc.StatusCode.UNAVAILABLE
    issue(stage.folder, "coordinator")
    async with stage.dial(coordinator) as channel:
        assert (await converse(channel, "Control")).HasField("report")


async def test_an_authority_is_replaced_step_by_step_and_nobody_is_shut_out(stage: Served) -> None:
    """While both are trusted, certificates of either pass, though the two have the same name."""
    coordinator = credentials(stage.folder, "coordinator")
    old = stage.folder / "old-ca.pem"
    old.write_bytes((stage.folder / "ca.pem").read_bytes())
    make_authority(stage.folder, mesh="test", replaces=True)
    trust(stage.folder / "ca.pem", by=stage.folder / "stage-1")
    trust(stage.folder / "ca.pem", by=stage.folder / "coordinator")
    for renewed in ("stage/1", "coordinator"):
        async with stage.dial(coordinator) as channel:
            assert (await converse(channel, "Control")).HasField("report")
        trust(old, by=issue(stage.folder, renewed))
    async with stage.dial(coordinator) as channel:
        assert (await converse(channel, "Control")).HasField("report")


async def test_a_revoked_certificate_calls_nothing_any_more_and_its_successor_does(
    stage: Served,
) -> None:
    coordinator = credentials(stage.folder, "coordinator")
    async with stage.dial(coordinator) as stolen:
        assert (await converse(stolen, "Control")).HasField("report")
        issue(stage.folder, "coordinator", revokes=True)
        error = await refusal(stolen)
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "has been revoked" in str(error.details())
    async with stage.dial(coordinator) as channel:
        assert (await converse(channel, "Control")).HasField("report")


async def test_nobody_is_let_in_while_nobody_can_tell_who_is_shut_out(stage: Served) -> None:
    (stage.folder / "stage-1" / "revoked.txt").mkdir()
    async with stage.dial(credentials(stage.folder, "coordinator")) as channel:
        assert (await refusal(channel)).code() is grpc.StatusCode.UNAVAILABLE


def test_what_is_not_there_cannot_be_revoked(tmp_path: Path) -> None:
    write_mesh(tmp_path)
    with pytest.raises(NotFound, match="nothing to revoke"):
        issue(tmp_path, "stage/1", revokes=True)


async def test_files_that_do_not_fit_together_are_passed_over(stage: Served) -> None:
    before = await serial_shown(stage)
    key = stage.folder / "stage-1" / "key.pem"
    key.write_bytes((stage.folder / "stage-2" / "key.pem").read_bytes())
    assert await serial_shown(stage) == before
    key.unlink()
    assert await serial_shown(stage) == before


async def test_files_of_another_role_are_passed_over(stage: Served) -> None:
    before = await serial_shown(stage)
    for name in ("key.pem", "cert.pem"):
        other = (stage.folder / "stage-2" / name).read_bytes()
        (stage.folder / "stage-1" / name).write_bytes(other)
    assert await serial_shown(stage) == before


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "mesh.example.org"])
async def test_beyond_loopback_nothing_is_listened_on_in_the_clear(host: str) -> None:
    with pytest.raises(InvalidInput, match=r"--certs FOLDER.*--insecure"):
        bind(create_server(no_telemetry()), f"{host}:0")


async def test_beyond_loopback_certificates_or_the_explicit_option_do(tmp_path: Path) -> None:
    write_mesh(tmp_path, "stage/1")
    own = Credentials(tmp_path / "stage-1")
    for options in ({"credentials": own}, {"insecure": True}):
        server = create_server(no_telemetry())
        assert bind(server, "0.0.0.0:0", **options) > 0
        await server.stop(None)


def trust(authority: Path, *, by: Path) -> None:
    """Adds an authority to those that an identity's folder has."""
    with (by / "ca.pem").open("ab") as file:
        file.write(authority.read_bytes())


def serial_written(stage: Served) -> int:
    pem = (stage.folder / "stage-1" / "cert.pem").read_bytes()
    return x509.load_pem_x509_certificate(pem).serial_number


async def serial_shown(stage: Served) -> int:
    """Of the certificate that a new connection gets to see."""
    own = stage.folder / "coordinator"
    context = ssl.create_default_context(cafile=str(stage.folder / "ca.pem"))
    context.load_cert_chain(own / "cert.pem", own / "key.pem")
    context.set_alpn_protocols(["h2"])
    host, port = stage.address.split(":")
    async with asyncio.timeout(TIMEOUT_S):
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).serial_number
