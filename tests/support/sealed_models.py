"""Tiny models, sealed for two stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.models.llama.parts import slice_parts, tensor_parts
from core.models.registry import load_config
from core.weights.open import open_checkpoint
from core.weights.sealed.identity import Identity, PublicIdentity, SealKeys, make_identity
from core.weights.sealed.sealing import Grant, seal


@dataclass(frozen=True, kw_only=True)
class SealedModel:
    """A sealed folder, its owner, and the identities of its stages."""

    folder: Path
    owner: Identity
    stages: tuple[Identity, ...]

    def keys(self, stage: int) -> SealKeys:
        """What a stage has."""
        return SealKeys(sealer=self.owner.public, identity=self.stages[stage])

    @property
    def owner_keys(self) -> SealKeys:
        return SealKeys(sealer=self.owner.public, identity=self.owner)


def seal_for_stages(
    plain: Path,
    folder: Path,
    *,
    layers: tuple[tuple[int, int], ...] = ((0, 2), (2, 4)),
    version: str = "1",
    owner: Identity | None = None,
    stages: tuple[Identity, ...] | None = None,
) -> SealedModel:
    """Seals a model for one identity a stage."""
    owner = owner or make_identity()
    stages = stages or tuple(make_identity() for _ in layers)
    checkpoint = open_checkpoint(plain)
    seal(
        checkpoint,
        folder,
        owner=owner,
        model="tiny",
        version=version,
        parts=tensor_parts(checkpoint),
        grants={
            f"stage-{index}": grant_for(plain, stages[index].public, *span)
            for index, span in enumerate(layers)
        },
    )
    checkpoint.close()
    return SealedModel(folder=folder, owner=owner, stages=stages)


def grant_for(plain: Path, identity: PublicIdentity, first_layer: int, end_layer: int) -> Grant:
    """The parts that a stage of these layers needs."""
    checkpoint = open_checkpoint(plain)
    config = load_config(checkpoint)
    checkpoint.close()
    parts = slice_parts(config, first_layer=first_layer, end_layer=end_layer)
    return Grant(identity=identity, parts=parts)
