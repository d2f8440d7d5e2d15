"""Files of identities: for their owners alone, and recognisable."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from core.errors import InvalidInput, NotFound
from core.weights.sealed.identity import (
    make_identity,
    parse_public_identity,
    read_identity,
    read_public_identity,
    write_identity,
)


def test_an_identity_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write_identity(tmp_path / "keys", "stage-0")
    assert read_identity(path).public == read_public_identity(path.with_suffix(".pub"))


def test_a_public_identity_is_a_line_that_can_be_mailed() -> None:
    public = make_identity().public
    assert parse_public_identity(str(public)) == public


def test_only_the_owner_may_read_a_key_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = write_identity(tmp_path, "stage-0")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = write_identity(tmp_path, "stage-0")
    path.chmod(0o640)
    with pytest.raises(InvalidInput, match="only its owner may read"):
        read_identity(path)


def test_no_key_is_ever_overwritten(tmp_path: Path) -> None:
    path = write_identity(tmp_path, "stage-0")
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="never overwritten"):
        write_identity(tmp_path, "stage-0")
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 65])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="letters, digits"):
        write_identity(tmp_path, name)


def test_another_file_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    path.write_text("some other secret")
    path.chmod(0o600)
    with pytest.raises(InvalidInput, match=r"penstock seal keygen") as refused:
        read_identity(path)
    assert "other secret" not in str(refused.value)
    with pytest.raises(InvalidInput, match=r"\.pub file"):
        read_public_identity(path)
    with pytest.raises(NotFound):
        read_identity(tmp_path / "none.key")


def test_a_private_key_is_not_shown_by_its_object() -> None:
    identity = make_identity()
    assert repr(identity) == "Identity()"
