"""`penstock certs`, as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.common.audit_check import read_lines
from services.common.credentials import Credentials
from services.common.data_folder import AUDIT_NAME


@pytest.fixture(autouse=True)
def audit_log(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("PENSTOCK_DATA", str(folder))
    return folder / AUDIT_NAME


def penstock(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["certs", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_folder_of_identities_is_made_and_one_is_renewed(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    penstock("init", "--folder", str(folder), "--mesh", "home", "--stages", "1")
    stage = folder / "stage-0"
    assert Credentials(stage).identity.uri == "spiffe://penstock/home/stage/0"
    before = (stage / "cert.pem").read_bytes()
    penstock("renew", "stage/0", "--folder", str(folder))
    assert Credentials(stage).identity.uri == "spiffe://penstock/home/stage/0"
    assert (stage / "cert.pem").read_bytes() != before


def test_a_stage_that_comes_later_gets_an_identity_too(tmp_path: Path) -> None:
    penstock("init", "--folder", str(tmp_path), "--stages", "1")
    penstock("renew", "stage/7", "--folder", str(tmp_path))
    assert Credentials(tmp_path / "stage-7").identity.role == "stage/7"


def test_what_is_revoked_every_part_is_told(tmp_path: Path) -> None:
    penstock("init", "--folder", str(tmp_path), "--stages", "1")
    lost = (tmp_path / "stage-0" / "cert.pem").read_bytes()
    penstock("renew", "stage/0", "--folder", str(tmp_path), "--revoke")
    penstock("renew", "stage/7", "--folder", str(tmp_path))
    for name in ("coordinator", "stage-0", "stage-7"):
        own = Credentials(tmp_path / name)
        assert own.have_revoked(lost)
        assert not own.have_revoked((tmp_path / name / "cert.pem").read_bytes())


def test_who_made_certificates_is_in_the_audit_log(tmp_path: Path, audit_log: Path) -> None:
    penstock("init", "--folder", str(tmp_path), "--stages", "1")
    penstock("renew", "stage/7", "--folder", str(tmp_path))
    events = [line.event for line in read_lines(audit_log)]
    assert events == ["certificates made", "certificate renewed"]
