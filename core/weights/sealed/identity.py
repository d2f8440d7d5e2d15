"""Who signs models and who may open them: pairs of keys, and the files that hold them.

An identity has an Ed25519 key to sign with and an X25519 key for which data keys are wrapped. The
file of an identity is one line: a tag, and both private keys in base64. Nobody but its owner may
read it. A public identity is such a line, too.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from core.errors import InvalidInput, NotFound

# The holder of all keys of a model, who can wrap them for others.
OWNER = "owner"
_PRIVATE_TAG = "penstock-private-identity-1"
_PUBLIC_TAG = "penstock-public-identity-1"
_KEY_BYTES = 32
_MOST_LINE_BYTES = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class PublicIdentity:
    """What others know of an identity."""

    signing: bytes  # Ed25519, raw
    opening: bytes  # X25519, raw

    def __str__(self) -> str:
        """The line that `parse_public_identity` reads."""
        return _line(_PUBLIC_TAG, self.signing + self.opening)

    @property
    def verifying_key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.signing)


@dataclass(frozen=True)
class Identity:
    """Both private keys; never shown."""

    signing: Ed25519PrivateKey = field(repr=False)
    opening: X25519PrivateKey = field(repr=False)

    @property
    def public(self) -> PublicIdentity:
        return PublicIdentity(
            self.signing.public_key().public_bytes_raw(),
            self.opening.public_key().public_bytes_raw(),
        )


@dataclass(frozen=True, kw_only=True)
class SealKeys:
    """What a process has to open sealed models with.

    `sealer` is the only one whose signature counts. Without `identity`, all but the tensors can
    be read.
    """

    sealer: PublicIdentity
    identity: Identity | None = None


def make_identity() -> Identity:
    """Two new keys."""
    return Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())


def write_identity(folder: Path, name: str) -> Path:
    """Makes an identity: NAME.key, for its owner alone, and NAME.pub; returns the first.

    Raises InvalidInput where there is such a file already.
    """
    check_name(name)
    identity = make_identity()
    private = identity.signing.private_bytes_raw() + identity.opening.private_bytes_raw()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{name}.key"
    try:
        _write_new(path, _line(_PRIVATE_TAG, private), mode=0o600)
        _write_new(folder / f"{name}.pub", str(identity.public), mode=0o644)
    except FileExistsError as error:
        taken = f"a name without {error.filename}, which is never overwritten"
        raise InvalidInput("name", name, taken) from None
    return path


def read_identity(path: Path) -> Identity:
    """Raises NotFound, or InvalidInput where it is no such file or others may read it."""
    try:
        others = path.stat().st_mode & 0o077
        text = _read_line(path)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    if others:
        raise InvalidInput("identity_key", str(path), "a file that only its owner may read (0600)")
    keys = _parse(text, _PRIVATE_TAG)
    if keys is None:  # the content is not shown: it may be a key in another form
        raise InvalidInput("identity_key", str(path), "a .key file of `penstock seal keygen`")
    return Identity(
        Ed25519PrivateKey.from_private_bytes(keys[:_KEY_BYTES]),
        X25519PrivateKey.from_private_bytes(keys[_KEY_BYTES:]),
    )


def read_public_identity(path: Path) -> PublicIdentity:
    """Raises NotFound, or InvalidInput where it is no such file."""
    try:
        return parse_public_identity(_read_line(path))
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    except InvalidInput:
        raise InvalidInput(
            "public_key", str(path), "a .pub file of `penstock seal keygen`"
        ) from None


def read_seal_keys(sealer: Path, identity: Path | None = None) -> SealKeys:
    """What a process is given as files. Raises NotFound or InvalidInput."""
    return SealKeys(
        sealer=read_public_identity(sealer),
        identity=None if identity is None else read_identity(identity),
    )


def parse_public_identity(text: str) -> PublicIdentity:
    """Raises InvalidInput."""
    keys = _parse(text, _PUBLIC_TAG)
    if keys is None:
        raise InvalidInput("public_key", text, f"{_PUBLIC_TAG}:...")
    return PublicIdentity(keys[:_KEY_BYTES], keys[_KEY_BYTES:])


def check_name(name: str) -> str:
    """A name that can be a file's, or InvalidInput."""
    if not _NAME.fullmatch(name):
        raise InvalidInput("name", name, "letters, digits, '.', '_' and '-', at most 64")
    return name


def _line(tag: str, keys: bytes) -> str:
    return f"{tag}:{base64.b64encode(keys).decode()}"


def _parse(text: str, tag: str) -> bytes | None:
    found, _, encoded = text.strip().partition(":")
    try:
        keys = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None
    return keys if found == tag and len(keys) == 2 * _KEY_BYTES else None


def _read_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MOST_LINE_BYTES).decode("ascii", errors="replace")


def _write_new(path: Path, line: str, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(line + "\n")
