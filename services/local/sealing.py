"""Seals a model for the stages of a mesh, and deals out its keys again when they change."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidInput
from core.models.llama.parts import slice_parts, tensor_parts
from core.models.registry import load_config
from core.pipeline.plan import StageSlice
from core.weights.open import open_checkpoint
from core.weights.sealed import sealing
from core.weights.sealed.header import SealHeader
from core.weights.sealed.identity import (
    PublicIdentity,
    SealKeys,
    read_identity,
    read_public_identity,
)
from core.weights.sealed.sealing import OWNER, Grant
from services.local.partition import plan_stages
from services.local.prepare import read_model
from services.local.seal_keys import private_key, public_key, stage_name

# Replicas may have keys of their own: stage-1-b, say.
_HOLDER = re.compile(r"stage-(\d+)(-[A-Za-z0-9._-]+)?")


@dataclass(frozen=True, kw_only=True)
class SealWishes:
    """How a model is cut, and whose keys open which stage.

    `holders` are public identities by name: stage-0, and stage-0-b for one more that may hold
    stage 0. Empty: those of the keys folder, one a stage.
    """

    keys: Path
    num_stages: int = 2
    split: str | None = None
    holders: Mapping[str, PublicIdentity]


def seal_model(model: Path, folder: Path, wishes: SealWishes, *, name: str, version: str) -> None:
    """Writes a sealed copy of a model that only the holders of its keys, and its owner, can read.

    Raises what reading the model and the keys raises, and InvalidInput.
    """
    owner = read_identity(private_key(wishes.keys, OWNER))
    grants = _grants(model, wishes, keys=None)
    with closing(open_checkpoint(model)) as checkpoint:
        load_config(checkpoint)  # refuses what could not be served either
        sealing.seal(
            checkpoint,
            folder,
            owner=owner,
            model=name,
            version=version,
            parts=tensor_parts(checkpoint),
            grants=grants,
        )


def rewrap_model(
    folder: Path,
    wishes: SealWishes,
    *,
    revoked: Collection[str],
    deals: bool,
    keeps: bool = False,
) -> SealHeader:
    """Changes who may open which layers of a sealed model, and touches no weights.

    Without `deals` nobody is given anything; with `keeps` holders also have what they had. Raises
    SealBroken, NotFound or InvalidInput.
    """
    owner = read_identity(private_key(wishes.keys, OWNER))
    keys = SealKeys(sealer=owner.public, identity=owner)
    grants = _grants(folder, wishes, keys=keys) if deals else {}
    return sealing.rewrap(folder, owner=owner, grants=grants, revoked=revoked, keeps=keeps)


def parse_holder(text: str) -> tuple[str, PublicIdentity]:
    """Reads "stage-0=path/to/key.pub"."""
    name, separator, path = text.partition("=")
    if not separator or not _HOLDER.fullmatch(name):
        raise InvalidInput("for", text, "STAGE=FILE, such as stage-0=stage-0.pub")
    return name, read_public_identity(Path(path).expanduser())


def _grants(model: Path, wishes: SealWishes, *, keys: SealKeys | None) -> dict[str, Grant]:
    facts = read_model(model, dtype="auto", keys=keys)
    plan = plan_stages(
        facts.config,
        number_format=facts.number_format,
        num_stages=wishes.num_stages,
        split=wishes.split,
    )
    slices = [stage.stage_slice for stage in plan.stages]
    holders = wishes.holders or {
        stage_name(index): read_public_identity(public_key(wishes.keys, stage_name(index)))
        for index in range(len(slices))
    }
    return {
        name: Grant(
            identity=identity,
            parts=slice_parts(
                facts.config,
                first_layer=_slice_of(name, slices).first_layer,
                end_layer=_slice_of(name, slices).end_layer,
            ),
        )
        for name, identity in holders.items()
    }


def _slice_of(holder: str, slices: list[StageSlice]) -> StageSlice:
    found = _HOLDER.fullmatch(holder)
    index = int(found[1]) if found else len(slices)
    if index >= len(slices):
        raise InvalidInput("for", holder, f"stage-0 to stage-{len(slices) - 1}")
    return slices[index]
