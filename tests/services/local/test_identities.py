"""A local mesh whose processes get identities."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import InvalidInput, NotFound
from services.common.certificates import issue
from services.common.credentials import Credentials
from services.local.identities import issue_missing, settle_identities
from services.local.layout import MeshLayout
from services.local.ports import HeldPorts
from services.local.prepare import prepare
from services.local.settings import MeshSettings
from tests.support.certificates import write_mesh
from tests.support.models import TinyModel, write_servable

INNER = ("supervisor", "operator", "coordinator", "gateway")


def layout(folder: Path, **settings: object) -> MeshLayout:
    model = str(write_servable(folder / "model", TinyModel()))
    with HeldPorts() as ports:
        made = MeshSettings(model=model, grpc_port=0, metrics_port=0, **settings)
        return prepare(made, ports=ports)


def identity_of(arguments: tuple[str, ...]) -> str:
    return Credentials(Path(arguments[arguments.index("--certs") + 1])).identity.role


def test_every_process_is_told_its_own_identity(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    commands = layout(tmp_path, replicas=(2,), certs=certs, makes_certs=True).commands()
    assert {command.name: identity_of(command.arguments) for command in commands} == {
        "stage-0": "stage/0",
        "stage-0-b": "stage/0",
        "stage-1": "stage/1",
        "stage-1-b": "stage/1",
        "coordinator": "coordinator",
        "gateway": "gateway",
    }


def test_without_certificates_no_process_hears_of_any(tmp_path: Path) -> None:
    commands = layout(tmp_path).commands()
    assert not any("--certs" in command.arguments for command in commands)


def test_a_folder_without_one_of_the_stages_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    write_mesh(tmp_path, *INNER, "stage/0")
    with pytest.raises(NotFound, match=r"stage-1/cert\.pem"):
        settle_identities(MeshSettings(certs=tmp_path))
    issue(tmp_path, "stage/1")
    assert settle_identities(MeshSettings(certs=tmp_path)) == str(tmp_path)


def test_an_identity_in_the_folder_of_another_is_refused(tmp_path: Path) -> None:
    write_mesh(tmp_path, *INNER, "stage/0", "stage/1")
    (tmp_path / "coordinator").rename(tmp_path / "former")
    (tmp_path / "gateway").rename(tmp_path / "coordinator")
    with pytest.raises(InvalidInput, match="the identity of a coordinator"):
        settle_identities(MeshSettings(certs=tmp_path))


def test_a_stage_that_comes_later_gets_an_identity_of_the_same_authority(tmp_path: Path) -> None:
    write_mesh(tmp_path, "stage/0", "stage/1")
    before = (tmp_path / "stage-1" / "cert.pem").read_bytes()
    assert issue_missing(str(tmp_path), [2, 1, 2]) == ["stage/2"]
    assert Credentials(tmp_path / "stage-2").identity.role == "stage/2"
    assert (tmp_path / "stage-1" / "cert.pem").read_bytes() == before


def test_without_the_authoritys_key_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    write_mesh(tmp_path, "stage/0")
    (tmp_path / "ca.key").unlink()
    with pytest.raises(NotFound, match=r"no identity of stage/1.*`penstock certs renew stage/1`"):
        issue_missing(str(tmp_path), [0, 1])
