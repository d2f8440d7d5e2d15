"""Seals a model, and changes who may open which parts of a sealed one."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import InvalidInput
from core.weights.checkpoint import Checkpoint
from core.weights.extents import FileExtents, companions, file_extents
from core.weights.mapped_file import MappedFile
from core.weights.sealed.chunks import CHUNK_BYTES, SealedExtent, sealed_extents
from core.weights.sealed.data_keys import DataKeys, make_keys, wrap_keys
from core.weights.sealed.header import (
    SEALED_SUFFIX,
    Holder,
    SealedFile,
    SealedTensor,
    SealHeader,
    read_header,
    write_header,
)
from core.weights.sealed.identity import OWNER, Identity, PublicIdentity, check_name


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Who shall be able to open which parts."""

    identity: PublicIdentity
    parts: Collection[str]


def seal(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    owner: Identity,
    model: str,
    version: str,
    parts: Mapping[str, str],
    grants: Mapping[str, Grant],
) -> SealHeader:
    """Writes a sealed copy of a model into a new or empty folder.

    `parts` names the part of every tensor; `grants` are by the holder's name. Signed by the owner,
    who can open everything. Raises InvalidInput.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InvalidInput("to", str(folder), "a folder that is empty, or not there yet")
    files = file_extents(checkpoint)
    header = SealHeader(
        model=model,
        version=version,
        seal_id=secrets.token_hex(16),
        format=checkpoint.format,
        files=tuple(_describe(file, parts) for file in files),
        companions={path.name: _sha256(path) for path in companions(checkpoint)},
        holders={},
    )
    keys = make_keys(header.parts)
    extents = sealed_extents(header)
    for file in files:
        _seal_file(file, folder, extents=extents[file.path.name], keys=keys)
    for path in companions(checkpoint):
        shutil.copyfile(path, folder / path.name)
    all_grants = {OWNER: Grant(identity=owner.public, parts=header.parts), **_checked(grants)}
    header = replace(header, holders=_wrap(header, keys, all_grants))
    write_header(folder, header, sealer=owner)
    return header


def rewrap(
    folder: Path,
    *,
    owner: Identity,
    grants: Mapping[str, Grant],
    revoked: Collection[str] = (),
    keeps: bool = False,
) -> SealHeader:
    """Gives holders the keys of other parts, adds holders and removes some; no weights are touched.

    A holder in `grants` has what the grant says from then on, and nothing else unless it `keeps`
    what it had. Whoever had a key before may have kept it anyway: only sealing anew takes a model
    away from him. Raises SealBroken where the owner has not signed the header, InvalidInput for a
    holder or a part that there is not, and for a grant to a key that is revoked at the same time.
    """
    header = read_header(folder, sealer=owner.public)
    for name in revoked:
        if name not in header.holders or name == OWNER:
            holders = ", ".join(sorted(header.holders.keys() - {OWNER})) or "nobody"
            raise InvalidInput("revoke", name, f"a holder: {holders}")
    lost = {header.holders[name].opening_key: name for name in revoked}
    for name, grant in grants.items():
        if (holder := lost.get(grant.identity.opening)) is not None:
            allowed = f"a holder whose key is given nothing, as {name} would be: name another key"
            raise InvalidInput("revoke", holder, f"{allowed} with --for {name}=FILE")
    data_keys = DataKeys(header, owner)
    keys = {part: data_keys[part] for part in header.parts}
    kept = {name: holder for name, holder in header.holders.items() if name not in revoked}
    given = _wrap(header, keys, _checked(grants))
    if keeps:
        given = {name: _with_earlier(holder, kept.get(name)) for name, holder in given.items()}
    header = replace(header, holders=kept | given)
    write_header(folder, header, sealer=owner)
    return header


def _with_earlier(holder: Holder, earlier: Holder | None) -> Holder:
    """With what the same identity could open before."""
    if earlier is None or earlier.opening_key != holder.opening_key:
        return holder
    return replace(holder, wraps={**earlier.wraps, **holder.wraps})


def _checked(grants: Mapping[str, Grant]) -> Mapping[str, Grant]:
    for name in grants:
        if check_name(name) == OWNER:
            raise InvalidInput("for", name, f"any name but {OWNER!r}, who has all keys anyway")
    return grants


def _wrap(
    header: SealHeader, keys: Mapping[str, bytes], grants: Mapping[str, Grant]
) -> dict[str, Holder]:
    # A model may lack a part that a slice of it could have, such as a head of its own.
    return {
        name: wrap_keys(
            {part: keys[part] for part in sorted(header.parts.intersection(grant.parts))},
            seal_id=header.seal_id,
            holder=grant.identity,
        )
        for name, grant in grants.items()
    }


def _describe(file: FileExtents, parts: Mapping[str, str]) -> SealedFile:
    with file.path.open("rb") as plain:
        prefix = plain.read(file.prefix_bytes)
    return SealedFile(
        name=file.path.name,
        prefix_bytes=file.prefix_bytes,
        prefix_sha256=hashlib.sha256(prefix).hexdigest(),
        tensors=tuple(
            SealedTensor(name=extent.name, size_bytes=extent.size_bytes, part=parts[extent.name])
            for extent in file.extents
        ),
    )


def _seal_file(
    file: FileExtents,
    folder: Path,
    *,
    extents: tuple[SealedExtent, ...],
    keys: Mapping[str, bytes],
) -> None:
    target_path = folder / (file.path.name + SEALED_SUFFIX)
    with closing(MappedFile(file.path)) as plain, target_path.open("wb") as target:
        target.write(plain.data[: file.prefix_bytes])
        for place, extent in zip(file.extents, extents, strict=True):
            for chunk in range(extent.num_chunks):
                offset, size = place.offset + chunk * CHUNK_BYTES, extent.chunk_size(chunk)
                key = keys[extent.tensor.part]
                target.write(extent.seal(key, chunk, plain.view(offset, size)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
