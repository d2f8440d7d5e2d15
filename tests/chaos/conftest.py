"""Meshes of a tiny model, made of real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import TinyModel, write_servable

TINY = TinyModel()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_servable(tmp_path_factory.mktemp("model"), TINY)
