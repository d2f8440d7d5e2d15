"""The header of a sealed model: all that can be read without a key, and who can open what.

On disk: a magic number, an Ed25519 signature (64 bytes) of all that follows, and a JSON object.
The signature is checked before anything is parsed. It covers the wraps of the data keys as well,
so that nobody but the sealer adds or removes a holder, and the digests of the files' prefixes,
which have names, shapes, types and offsets of all tensors. A MAC by the data keys would have
spared readers the sealer's public key; but whoever owns the storage could then have sealed a model
of his own for them, under keys of his own.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature

from core.errors import NotFound, SealBroken
from core.weights.formats import FORMATS
from core.weights.sealed.identity import Identity, PublicIdentity

HEADER_NAME = "sealed.header"
SEALED_SUFFIX = ".sealed"
MAGIC = b"PENSTOCK-SEALED1"
WRAP_BYTES = 80  # an ephemeral X25519 key, a data key of 32 bytes, a tag

_DOMAIN = b"penstock sealed model header 1\0"
SIGNATURE_BYTES = 64
# A model of a thousand layers with a hundred holders has 30 MB.
_MAX_BODY_BYTES = 1 << 26
_MAX_SIZE = 1 << 62
_FILE_NAME = re.compile(r"[^/\\\x00-\x1f]{1,255}")
_HEX = {size: re.compile(f"[0-9a-f]{{{2 * size}}}") for size in (16, 32)}


@dataclass(frozen=True, kw_only=True)
class SealedTensor:
    """The bytes of an extent; see `core.weights.extents`. `part` names the data key."""

    name: str
    size_bytes: int
    part: str


@dataclass(frozen=True, kw_only=True)
class SealedFile:
    """A file with tensors: its prefix as it was, then the extents of all tensors, sealed."""

    name: str
    prefix_bytes: int
    prefix_sha256: str
    tensors: tuple[SealedTensor, ...]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who may open some parts: the wrap of each part's data key."""

    opening_key: bytes
    wraps: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class SealHeader:
    """`seal_id` is random and new with every sealing: equal models sealed twice share no key.

    `companions` are the readable files of the folder, with their SHA-256.
    """

    model: str
    version: str
    seal_id: str
    format: str
    files: tuple[SealedFile, ...]
    companions: Mapping[str, str]
    holders: Mapping[str, Holder]

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(tensor.part for file in self.files for tensor in file.tensors)


def write_header(folder: Path, header: SealHeader, *, sealer: Identity) -> None:
    """Signs and writes the header; it takes the place of an older one at once or not at all."""
    body = json.dumps(_to_json(header), ensure_ascii=False, separators=(",", ":")).encode()
    signature = sealer.signing.sign(_DOMAIN + body)
    fresh = folder / f"{HEADER_NAME}.new"
    fresh.write_bytes(MAGIC + signature + body)
    fresh.replace(folder / HEADER_NAME)


def read_header(folder: Path, *, sealer: PublicIdentity) -> SealHeader:
    """Raises NotFound, or SealBroken where it is not as the sealer has signed it."""
    path = folder / HEADER_NAME
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BODY_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BODY_BYTES:
        raise SealBroken(f"{path} is longer than {_MAX_BODY_BYTES} bytes")
    if not content.startswith(MAGIC):
        raise SealBroken(f"{path} is not the header of a sealed model")
    signature = content[len(MAGIC) : len(MAGIC) + SIGNATURE_BYTES]
    body = content[len(MAGIC) + SIGNATURE_BYTES :]
    try:
        sealer.verifying_key.verify(signature, _DOMAIN + body)
    except (InvalidSignature, ValueError):
        raise SealBroken(
            f"{path} was not signed by the sealer that is trusted here, or it was changed since"
        ) from None
    return parse_body(body, path=path)


def parse_body(body: bytes, *, path: Path) -> SealHeader:
    """Reads what has been signed; believes nothing of it. Raises SealBroken."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SealBroken(f"{path} has no valid JSON: {error}") from None
    return _Parser(path).header(fields)


def _to_json(header: SealHeader) -> dict[str, Any]:
    return {
        "model": header.model,
        "version": header.version,
        "seal_id": header.seal_id,
        "format": header.format,
        "files": [
            {
                "name": file.name,
                "prefix_bytes": file.prefix_bytes,
                "prefix_sha256": file.prefix_sha256,
                "tensors": [[one.name, one.size_bytes, one.part] for one in file.tensors],
            }
            for file in header.files
        ],
        "companions": dict(header.companions),
        "holders": {
            name: {
                "opening_key": _encoded(holder.opening_key),
                "wraps": {part: _encoded(wrap) for part, wrap in holder.wraps.items()},
            }
            for name, holder in header.holders.items()
        },
    }


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _Parser:
    """Every method returns a checked value, or raises SealBroken with its place."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def header(self, fields: Any) -> SealHeader:
        files = tuple(self._file(entry) for entry in self._list(fields, "files"))
        header = SealHeader(
            model=self._text(fields, "model"),
            version=self._text(fields, "version"),
            seal_id=self._hex(fields, "seal_id", num_bytes=16),
            format=self._text(fields, "format"),
            files=files,
            companions={
                self._file_name(name): self._hex(self._mapping(fields, "companions"), name)
                for name in self._mapping(fields, "companions")
            },
            holders={
                name: self._holder(entry)
                for name, entry in self._mapping(fields, "holders").items()
            },
        )
        self._check(header)
        return header

    def _check(self, header: SealHeader) -> None:
        if header.format not in FORMATS or not header.files:
            raise self._error(f"{header.format!r} with {len(header.files)} files is no model")
        names = [file.name for file in header.files]
        names += [tensor.name for file in header.files for tensor in file.tensors]
        if len(set(names)) != len(names):
            raise self._error("a file or a tensor occurs twice")
        parts = header.parts
        if any(not parts.issuperset(holder.wraps) for holder in header.holders.values()):
            raise self._error("a holder has the key of a part that there is not")

    def _file(self, entry: Any) -> SealedFile:
        return SealedFile(
            name=self._file_name(self._text(entry, "name")),
            prefix_bytes=self._size(self._field(entry, "prefix_bytes")),
            prefix_sha256=self._hex(entry, "prefix_sha256"),
            tensors=tuple(self._tensor(one) for one in self._list(entry, "tensors")),
        )

    def _tensor(self, entry: Any) -> SealedTensor:
        if not isinstance(entry, list) or len(entry) != 3:
            raise self._error("a tensor is not a name, a size and a part")
        name, size_bytes, part = entry
        if not isinstance(name, str) or not isinstance(part, str):
            raise self._error("a tensor is not a name, a size and a part")
        return SealedTensor(name=name, size_bytes=self._size(size_bytes), part=part)

    def _holder(self, entry: Any) -> Holder:
        wraps = self._mapping(entry, "wraps")
        return Holder(
            opening_key=self._bytes(self._field(entry, "opening_key"), num_bytes=32),
            wraps={part: self._bytes(wrap, num_bytes=WRAP_BYTES) for part, wrap in wraps.items()},
        )

    def _field(self, fields: Any, key: str) -> Any:
        if not isinstance(fields, dict) or key not in fields:
            raise self._error(f"{key!r} is missing")
        return fields[key]

    def _text(self, fields: Any, key: str) -> str:
        value = self._field(fields, key)
        if not isinstance(value, str) or not 0 < len(value) <= 255:
            raise self._error(f"{key!r} is not a text of 1 to 255 characters")
        return value

    def _list(self, fields: Any, key: str) -> list[Any]:
        value = self._field(fields, key)
        if not isinstance(value, list):
            raise self._error(f"{key!r} is not a list")
        return value

    def _mapping(self, fields: Any, key: str) -> dict[str, Any]:
        value = self._field(fields, key)
        if not isinstance(value, dict):
            raise self._error(f"{key!r} is not an object")
        return value

    def _size(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_SIZE:
            raise self._error("a size is not a number of bytes")
        return value

    def _hex(self, fields: Any, key: str, *, num_bytes: int = 32) -> str:
        value = self._field(fields, key)
        if not isinstance(value, str) or not _HEX[num_bytes].fullmatch(value):
            raise self._error(f"{key!r} is not {num_bytes} bytes in hex")
        return value

    def _bytes(self, value: Any, *, num_bytes: int) -> bytes:
        try:
            decoded = base64.b64decode(value, validate=True)
        except (ValueError, TypeError):
            decoded = b""
        if len(decoded) != num_bytes:
            raise self._error(f"a key or a wrap is not {num_bytes} bytes in base64")
        return decoded

    def _file_name(self, value: str) -> str:
        if not _FILE_NAME.fullmatch(value) or value in (".", "..", HEADER_NAME):
            raise self._error(f"{value!r} cannot be a file's name here")
        return value

    def _error(self, message: str) -> SealBroken:
        return SealBroken(f"{self._path}: {message}")
