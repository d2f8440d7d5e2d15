"""The identities with which the processes of a local mesh know each other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import NotFound
from services.common.credentials import AUTHORITIES, Credentials, load_credentials
from services.common.identity import (
    COORDINATOR,
    GATEWAY,
    OPERATOR,
    STAGE,
    SUPERVISOR,
    name_of,
    stage_role,
)

if TYPE_CHECKING:  # the supervisor imports what follows, and nothing that reads models
    from services.local.settings import MeshSettings


def settle_identities(settings: MeshSettings) -> str:
    """Folder of the identities of all parts, made first where that is asked for; "" for a mesh
    without. Raises NotFound or InvalidInput where one is missing or of no use."""
    if settings.certs is None:
        return ""
    folder = settings.certs.expanduser().absolute()
    if settings.makes_certs:
        # Imported here: takes 60 ms, of which a mesh without certificates need not know.
        from services.common.certificates import make_mesh

        make_mesh(folder, mesh="local", num_stages=settings.num_stages, replaces=True)
    for role in (SUPERVISOR, OPERATOR, COORDINATOR, GATEWAY):
        load_credentials(folder / role, kind=role)
    for index in range(settings.num_stages):
        load_credentials(folder / name_of(stage_role(index)), kind=STAGE)
    return str(folder)


def issue_missing(certs: str, stage_indices: Iterable[int]) -> list[str]:
    """Makes the identities of stages that a mesh did not begin with; returns those roles.

    Raises NotFound where one is missing and the authority's key is not in the folder, InvalidInput.
    """
    issued = []
    for role in map(stage_role, sorted(set(stage_indices))):
        folder = Path(certs) / name_of(role)
        if not folder.exists():
            _issue(folder.parent, role)
            issued.append(role)
        load_credentials(folder, kind=STAGE)
    return issued


def _issue(folder: Path, role: str) -> None:
    from services.common.certificates import AUTHORITY_KEY, issue  # likewise

    if not (folder / AUTHORITY_KEY).exists():
        raise NotFound(
            f"{folder} has no identity of {role}, and no {AUTHORITY_KEY} to make one with: "
            f"`penstock certs renew {role}` where that is"
        )
    issue(folder, role)


def credentials_for(certs: str, role: str) -> Credentials | None:
    """Of the supervisor, or the operator; None for a mesh without."""
    return load_credentials(Path(certs) / role, kind=role) if certs else None


def authority_of(certs: str) -> Path | None:
    """What clients must trust; None for a mesh without."""
    return Path(certs) / AUTHORITIES if certs else None
