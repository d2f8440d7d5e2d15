"""Models of the catalogue are served with a manifest, made once of files that are verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from core.errors import CorruptWeights
from services.local import manifests
from services.local.catalogue import CatalogueFile, CatalogueModel
from services.local.manifests import catalogue_manifest
from tests.support.models import TinyModel, write_gguf


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the catalogue knows as "tiny"."""
    path = write_gguf(tmp_path / "m.gguf", TinyModel())
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    model = CatalogueModel(
        name="tiny",
        description="",
        num_parameters=1,
        context_length=1,
        number_format="F32",
        licence="MIT",
        registry="pypi",
        parts=(),
        files=(CatalogueFile(name="m.gguf", size_bytes=len(content), sha256=sha256),),
    )
    monkeypatch.setattr(manifests, "CATALOGUE", (model,))
    return path


def test_a_model_of_the_catalogue_gets_a_manifest_beside_it(path: Path) -> None:
    manifest = catalogue_manifest("tiny", path)
    assert manifest == path.parent / "manifest.json"
    assert json.loads(manifest.read_text())["files"][0]["name"] == "m.gguf"
    before = manifest.stat().st_mtime_ns
    assert catalogue_manifest("tiny", path) == manifest
    assert manifest.stat().st_mtime_ns == before


def test_no_manifest_is_made_of_other_bytes_than_the_catalogue_has(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptWeights, match="remove it, and it is fetched again"):
        catalogue_manifest("tiny", path)
    assert not (path.parent / "manifest.json").exists()


def test_other_models_have_none(path: Path) -> None:
    assert catalogue_manifest(str(path), path) is None
