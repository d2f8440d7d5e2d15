"""Certificates for tests: of a whole mesh, and such as must be refused."""

from __future__ import annotations

from pathlib import Path

from services.common.certificates import issue, make_authority
from services.common.credentials import Credentials
from services.common.identity import name_of

MESH = "test"


def write_mesh(folder: Path, *roles: str, mesh: str = MESH) -> None:
    """Makes an authority, and identities of these roles."""
    make_authority(folder, mesh=mesh)
    for role in roles:
        issue(folder, role)


def credentials(folder: Path, role: str) -> Credentials:
    """Of a role, made first where there are none."""
    own = folder / name_of(role)
    if not own.exists():
        issue(folder, role)
    return Credentials(own)
