"""The store: what is put in comes out, in another process too."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from core.errors import NotFound, Unavailable
from services.common.keys import ApiKey, KeyLimits
from services.common.store import Store


def key(key_id: str = "1", **fields: Any) -> ApiKey:
    return ApiKey(
        **{"tenant": "t", "secret_hash": b"h" * 32, "created_at_s": 1.0} | fields, key_id=key_id
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store.db"


def test_keys_come_back_as_they_were(path: Path) -> None:
    limits = KeyLimits(max_streams=1, tokens_per_minute=2, max_prompt_tokens=3, max_priority=-4)
    full = key(
        "2",
        created_at_s=2.0,
        scopes=frozenset({"models"}),
        models=frozenset({"a", "b"}),
        limits=limits,
        expires_at_s=3.5,
    )
    store = Store(path)
    store.add_key(full)
    store.add_key(key("1"))
    assert Store(path).all_keys() == [key("1"), full]


def test_a_revocation_is_final_and_keeps_its_time(path: Path) -> None:
    store = Store(path)
    store.add_key(key("1"))
    assert store.revoke_key("1", now_s=5.0).revoked_at_s == 5.0
    assert store.revoke_key("1", now_s=9.0).revoked_at_s == 5.0
    assert store.all_keys()[0].revoked_at_s == 5.0


def test_a_key_that_does_not_exist_cannot_be_revoked(path: Path) -> None:
    with pytest.raises(NotFound, match="'7'"):
        Store(path).revoke_key("7", now_s=1.0)


def test_every_change_is_a_new_revision_for_all(path: Path) -> None:
    store, other = Store(path), Store(path)
    revisions = [other.revision()]
    store.add_key(key("1"))
    revisions.append(other.revision())
    store.revoke_key("1", now_s=1.0)
    revisions.append(other.revision())
    assert len(set(revisions)) == 3


def test_all_who_begin_at_once_share_one_secret(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: Store(path).salt_secret(), range(8)))
    (secret,) = secrets
    assert len(secret) == 32


def test_a_file_that_is_no_store_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(Unavailable, match=r"store\.db"):
        Store(path)


def test_a_store_of_another_format_is_refused(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("update state set format = 2")
    connection.close()
    with pytest.raises(Unavailable, match="format 2"):
        Store(path)
