"""API keys: their text, what is kept of it, and how it is compared."""

from __future__ import annotations

import hmac
import inspect
from hashlib import sha256
from typing import Any

import pytest

from core.errors import InvalidInput
from services.common.keys import (
    ApiKey,
    KeyLimits,
    draw_key,
    hash_secret,
    holds,
    read_key,
    tenant_salt,
)


def key(**fields: Any) -> ApiKey:
    text = draw_key()
    known = {"key_id": text.key_id, "tenant": "t", "secret_hash": hash_secret(text.secret)}
    return ApiKey(**{"created_at_s": 1.0} | known | fields)


def test_a_key_is_read_as_it_was_written_and_no_two_are_alike() -> None:
    first, second = draw_key(), draw_key()
    assert read_key(str(first)) == first
    assert first.key_id != second.key_id
    assert first.secret != second.secret
    assert len(bytes.fromhex(first.secret)) == 32


@pytest.mark.parametrize("change", ["", "x", "\n", " ", "0"])
def test_what_does_not_read_like_a_key_is_none(change: str) -> None:
    text = str(draw_key())
    assert read_key(text + change if change else text[:-1]) is None


def test_only_a_hash_of_the_secret_is_kept() -> None:
    text = draw_key()
    kept = key(secret_hash=hash_secret(text.secret))
    assert kept.secret_hash == sha256(text.secret.encode()).digest()
    assert text.secret not in repr(kept)


def test_a_secret_is_held_by_its_key_alone() -> None:
    text = draw_key()
    kept = key(secret_hash=hash_secret(text.secret))
    assert holds(kept, text.secret)
    assert not holds(kept, draw_key().secret)
    assert not holds(None, text.secret)


def test_secrets_are_compared_in_constant_time_also_where_nobody_has_the_id() -> None:
    compared = []

    def is_equal(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return True

    assert not holds(None, "secret", is_equal=is_equal)
    assert holds(key(), "secret", is_equal=is_equal)
    assert compared == [(32, 32)] * 2
    default = inspect.signature(holds).parameters["is_equal"].default
    assert default is hmac.compare_digest


@pytest.mark.parametrize(
    ("fields", "now_s", "state"),
    [
        ({}, 1e12, "valid"),
        ({"expires_at_s": 10.0}, 9.9, "valid"),
        ({"expires_at_s": 10.0}, 10.0, "expired"),
        ({"revoked_at_s": 5.0}, 9.0, "revoked"),
        ({"expires_at_s": 10.0, "revoked_at_s": 5.0}, 20.0, "revoked"),
    ],
)
def test_a_key_is_valid_until_it_expires_or_is_revoked(
    fields: dict[str, float], now_s: float, state: str
) -> None:
    assert key(**fields).state(now_s) == state


def test_models_are_all_or_those_named() -> None:
    assert key().allows_model("any")
    assert key(models=frozenset({"a"})).allows_model("a")
    assert not key(models=frozenset({"a"})).allows_model("b")


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": ""},
        {"tenant": "x" * 129},
        {"tenant": "two\nlines"},
        {"scopes": frozenset()},
        {"scopes": frozenset({"everything"})},
    ],
)
def test_a_wrong_key_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        key(**fields)


@pytest.mark.parametrize("name", ["max_streams", "tokens_per_minute", "max_prompt_tokens"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        KeyLimits(**{name: 0})


def test_salts_follow_from_tenant_and_secret() -> None:
    salts = {tenant_salt(tenant, secret=secret) for tenant in ("a", "b") for secret in (b"1", b"2")}
    assert len(salts) == 4
    assert tenant_salt("a", secret=b"1") in salts
