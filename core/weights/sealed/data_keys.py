"""One data key for each part of a model, wrapped for everybody who may hold it.

A wrap is HPKE (RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM): an
ephemeral key agreed with the holder's static one. Its `info` binds it to the sealing, the part and
the holder, so that a wrap is of no use anywhere else.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from core.errors import KeyRefused, SealBroken
from core.weights.sealed.header import Holder, SealHeader
from core.weights.sealed.identity import Identity, PublicIdentity

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_KEY_BYTES = 32


class DataKeys:
    """The data keys that an identity may hold; each is unwrapped when first asked for."""

    def __init__(self, header: SealHeader, identity: Identity | None) -> None:
        self._header = header
        self._identity = identity
        self._keys: dict[str, bytes] = {}

    def __getitem__(self, part: str) -> bytes:
        """Raises KeyRefused where there is no wrap for this identity, SealBroken where there is
        one that does not open."""
        if part not in self._keys:
            self._keys[part] = self._unwrap(part)
        return self._keys[part]

    def _unwrap(self, part: str) -> bytes:
        header, identity = self._header, self._identity
        what = f"{part!r} of the sealed model {header.model!r}"
        if identity is None:
            raise KeyRefused(f"{what} cannot be opened without an identity key")
        holder = _holder_with(header, identity.public.opening)
        if holder is None or part not in holder.wraps:
            raise KeyRefused(
                f"this identity holds no key for {what}: none was wrapped for it, or it was revoked"
            )
        info = _info(header.seal_id, part, identity.public.opening)
        try:
            return _SUITE.decrypt(holder.wraps[part], identity.opening, info)
        except InvalidTag:
            raise SealBroken(f"the wrapped key of {what} does not open") from None


def make_keys(parts: Collection[str]) -> dict[str, bytes]:
    """New data keys."""
    return {part: secrets.token_bytes(_KEY_BYTES) for part in parts}


def wrap_keys(keys: Mapping[str, bytes], *, seal_id: str, holder: PublicIdentity) -> Holder:
    """Lets `holder` open these parts."""
    recipient = X25519PublicKey.from_public_bytes(holder.opening)
    wraps = {
        part: _SUITE.encrypt(key, recipient, _info(seal_id, part, holder.opening))
        for part, key in keys.items()
    }
    return Holder(opening_key=holder.opening, wraps=wraps)


def _holder_with(header: SealHeader, opening_key: bytes) -> Holder | None:
    for holder in header.holders.values():
        if holder.opening_key == opening_key:
            return holder
    return None


def _info(seal_id: str, part: str, opening_key: bytes) -> bytes:
    return b"\0".join([b"penstock data key 1", seal_id.encode(), opening_key, part.encode()])
