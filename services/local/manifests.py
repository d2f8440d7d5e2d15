"""Manifests of models that a mesh serves; those of the catalogue have one without being asked."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

from core.errors import CorruptWeights
from core.weights.manifest import make_manifest, write_manifest
from core.weights.open import open_checkpoint
from services.local.catalogue import CATALOGUE, CatalogueModel

_NAME = "manifest.json"


def write_manifest_of(model: Path, to: Path) -> None:
    """Hashes a model and writes its manifest. Raises what opening the model raises."""
    with closing(open_checkpoint(model)) as checkpoint:
        write_manifest(make_manifest(checkpoint), to)


def catalogue_manifest(spec: str, path: Path) -> Path | None:
    """The manifest of a model of the catalogue, beside its files; None for any other model, and
    where it cannot be written.

    It is made of files that have the SHA-256 that the catalogue says; raises CorruptWeights where
    they have another.
    """
    model = next((model for model in CATALOGUE if model.name == spec), None)
    if model is None:
        return None
    manifest = path.with_name(_NAME)
    if not manifest.exists():
        _check_files(model, path.parent)
        try:
            write_manifest_of(path, manifest)
        except OSError:  # a cache that is shared, and not ours to write
            return None
    return manifest


def _check_files(model: CatalogueModel, folder: Path) -> None:
    for file in model.files:
        with (folder / file.name).open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != file.sha256:
            raise CorruptWeights(
                f"{folder / file.name} has the SHA-256 {found}, not {file.sha256}; remove it, and "
                "it is fetched again"
            )
