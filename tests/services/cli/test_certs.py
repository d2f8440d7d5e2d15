"""`penstock certs`, as it is typed."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from services.cli.__main__ import app
from services.common.credentials import Credentials


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
