"""API keys: what one is, what it allows, and how its secret is kept.

A key reads `penstock_ID_SECRET`. The ID finds its row and may be shown; of the secret only the
SHA-256 is kept. Slow, salted hashes are for passwords, which can be guessed: this secret is 256
random bits, of which no table can be made and no second user has the same, so that one fast hash
is as hard to turn round, and checking a key costs microseconds where a password hash is made to
cost a tenth of a second, which anybody could have the gateway spend.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import NamedTuple

from core.errors import InvalidInput

GENERATE, TOKENIZE, MODELS, STATUS = "generate", "tokenize", "models", "status"
SCOPES = (GENERATE, TOKENIZE, MODELS, STATUS)
AUTHORIZATION = "authorization"  # the metadata that a key comes in
MAX_TENANT_CHARS = 128
MAX_PRIORITY = 100

_ID_BYTES, _SECRET_BYTES = 8, 32
_FORM = re.compile(rf"penstock_([0-9a-f]{{{2 * _ID_BYTES}}})_([0-9a-f]{{{2 * _SECRET_BYTES}}})")
# What the secret of an id that nobody has is compared with.
_NOBODYS = bytes(32)


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What requests with a key may take. None: no limit of the key's own."""

    max_streams: int | None = None
    """Requests that are answered at a time."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers together."""
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_priority: int = 0
    """The highest class that a request may ask for; see Submission in coordinator.proto."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "max_priority" and value is not None and value < 1:
                raise InvalidInput(name, value, "at least 1, or nothing for no limit")
        if abs(self.max_priority) > MAX_PRIORITY:
            allowed = f"{-MAX_PRIORITY} to {MAX_PRIORITY}"
            raise InvalidInput("max_priority", self.max_priority, allowed)


UNLIMITED = KeyLimits(max_priority=MAX_PRIORITY)


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key without its secret. Times are seconds since the epoch."""

    key_id: str
    tenant: str
    secret_hash: bytes = field(repr=False)
    created_at_s: float
    scopes: frozenset[str] = frozenset(SCOPES)
    models: frozenset[str] = frozenset()
    """Names of the models that it may use; empty: all."""
    limits: KeyLimits = KeyLimits()
    expires_at_s: float | None = None
    revoked_at_s: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.tenant) <= MAX_TENANT_CHARS or not self.tenant.isprintable():
            allowed = f"1 to {MAX_TENANT_CHARS} printable characters"
            raise InvalidInput("tenant", self.tenant, allowed)
        if not self.scopes or not self.scopes.issubset(SCOPES):
            raise InvalidInput("scopes", ",".join(sorted(self.scopes)), " ".join(SCOPES))

    def allows_model(self, name: str) -> bool:
        return not self.models or name in self.models

    def state(self, now_s: float) -> str:
        """ "valid", "expired" or "revoked"."""
        if self.revoked_at_s is not None:
            return "revoked"
        is_over = self.expires_at_s is not None and now_s >= self.expires_at_s
        return "expired" if is_over else "valid"


class KeyText(NamedTuple):
    """The two parts of a key that somebody shows."""

    key_id: str
    secret: str

    def __str__(self) -> str:
        return f"penstock_{self.key_id}_{self.secret}"


def as_metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    """What a client sends with each RPC; nothing where it has no key."""
    return () if key is None else ((AUTHORIZATION, f"Bearer {key}"),)


def draw_key() -> KeyText:
    """A new key; whoever gets it is the only one who ever sees its secret."""
    return KeyText(secrets.token_hex(_ID_BYTES), secrets.token_hex(_SECRET_BYTES))


def read_key(text: str) -> KeyText | None:
    """Takes a key apart; None where it does not look like one."""
    match = _FORM.fullmatch(text)
    return None if match is None else KeyText(match[1], match[2])


def hash_secret(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def holds(
    key: ApiKey | None,
    secret: str,
    *,
    is_equal: Callable[[bytes, bytes], bool] = hmac.compare_digest,
) -> bool:
    """Whether `secret` is the key's; takes as long where there is no such key.

    `is_equal` must not tell by its time where its arguments differ.
    """
    expected = _NOBODYS if key is None else key.secret_hash
    is_right = is_equal(hash_secret(secret), expected)
    return key is not None and is_right


def tenant_salt(tenant: str, *, secret: bytes) -> str:
    """What keeps a tenant's cached prefixes apart: nobody outside can compute another's."""
    return blake2b(tenant.encode(), key=secret, digest_size=16, person=b"prefix salt").hexdigest()
