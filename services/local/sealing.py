"""Seals a model for the stages of a mesh, and deals out its keys again when they change."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core.errors import InvalidInput
from core.models.llama.config import LlamaConfig
from core.models.llama.parts import slice_parts, tensor_parts
from core.models.registry import load_config
from core.pipeline.plan import StageSlice
from core.weights.open import open_checkpoint
from core.weights.sealed import sealing
from core.weights.sealed.header import Holder, SealHeader, read_header
from core.weights.sealed.identity import (
    OWNER,
    PublicIdentity,
    SealKeys,
    read_identity,
    read_public_identity,
)
from core.weights.sealed.sealing import Grant
from services.local.key_files import private_key, public_key, stage_name
from services.local.partition import plan_stages
from services.local.prepare import read_model
from services.local.seal_keys import opened_layers

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
    grants = _grants(_cut(model, wishes, keys=None), wishes)
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
    SealBroken, NotFound, or InvalidInput, also where a holder that is given nothing and not revoked
    would have layers that the cut gives to other stages.
    """
    owner = read_identity(private_key(wishes.keys, OWNER))
    grants: Mapping[str, Grant] = {}
    if deals:
        cut = _cut(folder, wishes, keys=SealKeys(sealer=owner.public, identity=owner))
        grants = _grants(cut, wishes)
        if not keeps:
            holders = read_header(folder, sealer=owner.public).holders
            others = holders.keys() - {OWNER, *revoked, *grants}
            _refuse_surplus({name: holders[name] for name in sorted(others)}, cut)
    return sealing.rewrap(folder, owner=owner, grants=grants, revoked=revoked, keeps=keeps)


def parse_holder(text: str) -> tuple[str, PublicIdentity]:
    """Reads "stage-0=path/to/key.pub"."""
    name, separator, path = text.partition("=")
    if not separator or not _HOLDER.fullmatch(name):
        raise InvalidInput("for", text, "STAGE=FILE, such as stage-0=stage-0.pub")
    return name, read_public_identity(Path(path).expanduser())


class _Cut(NamedTuple):
    """A model in stages."""

    config: LlamaConfig
    slices: tuple[StageSlice, ...]

    def parts_of(self, holder: str) -> frozenset[str]:
        """What it needs for its stage; nothing where there is no such stage."""
        found = _HOLDER.fullmatch(holder)
        index = int(found[1]) if found else len(self.slices)
        if index >= len(self.slices):
            return frozenset()
        one = self.slices[index]
        return slice_parts(self.config, first_layer=one.first_layer, end_layer=one.end_layer)


def _cut(model: Path, wishes: SealWishes, *, keys: SealKeys | None) -> _Cut:
    facts = read_model(model, dtype="auto", keys=keys)
    plan = plan_stages(
        facts.config,
        number_format=facts.number_format,
        num_stages=wishes.num_stages,
        split=wishes.split,
    )
    return _Cut(facts.config, plan.slices)


def _grants(cut: _Cut, wishes: SealWishes) -> dict[str, Grant]:
    holders = wishes.holders or {
        stage_name(index): read_public_identity(public_key(wishes.keys, stage_name(index)))
        for index in range(len(cut.slices))
    }
    for name in holders:
        if not cut.parts_of(name):
            raise InvalidInput("for", name, f"stage-0 to stage-{len(cut.slices) - 1}")
    return {
        name: Grant(identity=identity, parts=cut.parts_of(name))
        for name, identity in holders.items()
    }


def _refuse_surplus(holders: Mapping[str, Holder], cut: _Cut) -> None:
    """Raises InvalidInput where one could open more than the layers of its stage."""
    surplus = [
        f"{name} ({opened_layers(holder)})"
        for name, holder in holders.items()
        if not cut.parts_of(name).issuperset(holder.wraps)
    ]
    if surplus:
        raise InvalidInput(
            "revoke",
            None,
            f"{', '.join(surplus)}, which would keep what this cut gives to others; or their keys "
            "with --for, or --keep while layers move",
        )
