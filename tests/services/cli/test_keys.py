"""`penstock keys` and `penstock audit`, as a user types them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from core.errors import CorruptLog, InvalidInput, NotFound, PenstockError
from services.cli.app import app
from services.common.audit_check import read_lines
from services.common.data_folder import AUDIT_NAME, STORE_NAME
from services.common.keys import ApiKey, hash_secret, read_key
from services.common.store import Store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of the commands."""
    monkeypatch.setenv("PENSTOCK_DATA", str(tmp_path))
    return tmp_path


def penstock(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=True)


def create(*options: str) -> str:
    """The key that `keys create` shows."""
    done = penstock("keys", "create", "--tenant", "acme", *options)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def only_key(folder: Path) -> ApiKey:
    (key,) = Store(folder / STORE_NAME).all_keys()
    return key


def failure(done: Result) -> BaseException:
    assert done.exit_code != 0
    assert done.exception is not None
    return done.exception


def test_a_key_is_shown_once_and_kept_as_a_hash(folder: Path) -> None:
    shown = create()
    parts = read_key(shown)
    assert parts is not None
    kept = only_key(folder)
    assert (kept.key_id, kept.tenant) == (parts.key_id, "acme")
    assert kept.secret_hash == hash_secret(parts.secret)
    listed = penstock("keys", "list").stdout
    assert parts.key_id in listed
    assert parts.secret not in listed
    assert all(parts.secret.encode() not in path.read_bytes() for path in folder.iterdir())


def test_what_a_key_allows_is_as_asked(folder: Path) -> None:
    create(
        *("--scopes", "generate, models", "--models", "a,b", "--expires", "2h"),
        *("--max-streams", "1", "--tokens-per-minute", "2", "--max-prompt-tokens", "3"),
        *("--max-output-tokens", "4", "--max-priority", "5"),
    )
    key = only_key(folder)
    assert key.scopes == {"generate", "models"}
    assert key.models == {"a", "b"}
    assert list(vars(key.limits).values()) == [1, 2, 3, 4, 5]
    assert key.expires_at_s is not None
    assert 7100 < key.expires_at_s - time.time() <= 7200


@pytest.mark.parametrize(
    "options",
    [
        ("--scopes", "everything"),
        ("--scopes", ""),
        ("--expires", "tomorrow"),
        ("--max-streams", "0"),
        ("--max-priority", "101"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(folder: Path, options: tuple[str, str]) -> None:
    error = failure(penstock("keys", "create", "--tenant", "acme", *options))
    assert isinstance(error, InvalidInput)
    assert not Store(folder / STORE_NAME).all_keys()


def test_a_revoked_key_is_shown_as_such(folder: Path) -> None:
    create()
    key_id = only_key(folder).key_id
    assert "valid" in penstock("keys", "list").stdout
    assert penstock("keys", "revoke", key_id).exit_code == 0
    assert only_key(folder).state(time.time()) == "revoked"
    assert "revoked" in penstock("keys", "list").stdout
    assert isinstance(failure(penstock("keys", "revoke", "unknown")), NotFound)


def test_what_is_done_to_keys_is_in_the_audit_log(folder: Path) -> None:
    secret = create().rpartition("_")[2]
    key_id = only_key(folder).key_id
    penstock("keys", "revoke", key_id)
    lines = list(read_lines(folder / AUDIT_NAME))
    assert [line.event for line in lines] == ["key created", "key revoked"]
    assert all(line.details["key_id"] == key_id for line in lines)
    assert all(line.actor.startswith("user ") for line in lines)
    assert secret not in (folder / AUDIT_NAME).read_text()


def test_a_whole_log_is_verified_by_its_head_and_shown(folder: Path) -> None:
    create()
    done = penstock("audit", "verify")
    assert done.exit_code == 0
    head = done.stdout.split()[-1]
    create()
    assert penstock("audit", "verify", "--expect-head", head).exit_code == 0
    assert isinstance(failure(penstock("audit", "verify", "--expect-head", "0" * 63)), CorruptLog)
    assert penstock("audit", "show").stdout.count("key created") == 2


def test_a_changed_line_is_named_and_fails(folder: Path) -> None:
    for _ in range(3):
        create()
    path = folder / AUDIT_NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace("acme", "evil"), lines[2]]))
    for arguments in ((), (str(path),)):
        error = failure(penstock("audit", "verify", *arguments))
        assert isinstance(error, PenstockError)
        assert "line 2 " in str(error)


def test_a_terminal_does_not_obey_what_a_line_holds(folder: Path) -> None:
    create()
    path = folder / AUDIT_NAME
    path.write_text(path.read_text().replace('"key created"', '"[bold]\\u001b[2J"'))
    shown = penstock("audit", "show").stdout
    assert "\x1b" not in shown
    assert "[bold]" in shown


def test_keys_of_sealed_models_are_in_the_audit_log(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "seal-keys"
    assert penstock("seal", "keygen", "stage-3", "--seal-keys", str(keys)).exit_code == 0
    (line,) = read_lines(folder / AUDIT_NAME)
    assert (line.event, line.details["name"]) == ("seal key made", "stage-3")
