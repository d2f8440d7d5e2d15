"""What a stage says of the model that it has loaded."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from penstock.v1 import stage_pb2

from core.engine.engine import Engine
from core.errors import KeyRefused, ManifestMismatch, SealBroken
from core.weights.manifest import make_manifest, write_manifest
from core.weights.open import open_checkpoint
from core.weights.sealed.identity import read_identity, write_identity
from core.weights.sealed.sealing import rewrap
from services.stage.model import load_model
from services.stage.settings import StageSettings
from services.stage.slowed_engine import SlowedEngine
from tests.support.models import TinyModel, random_weights, write_hugging_face, write_safetensors
from tests.support.sealed_models import grant_for, seal_for_stages

WIRES = ("f32", "bf16", "int8")


def load(folder: Path, layers: tuple[int, int], **settings: Any) -> stage_pb2.StageReady:
    """The manifest of a stage."""
    first, end = layers
    return load_model(
        StageSettings(
            model=folder, name="tiny", first_layer=first, end_layer=end, listen="", **settings
        )
    ).manifest


def tuned(folder: Path, tensor: str) -> Path:
    """A model that differs from the others in one element of one tensor."""
    write_hugging_face(folder, TinyModel())
    weights = random_weights(TinyModel())
    weights[tensor] = weights[tensor].copy()
    weights[tensor][-1, -1] += np.float32(0.125)
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def test_weights_are_named_stage_by_stage_and_the_model_by_its_configuration(
    tmp_path: Path,
) -> None:
    one = write_hugging_face(tmp_path / "one", TinyModel())
    same = write_hugging_face(tmp_path / "same", TinyModel())
    other = tuned(tmp_path / "other", "model.layers.2.mlp.up_proj.weight")
    first, second = (0, 2), (2, 4)
    digests = {
        (folder.name, layers): load(folder, layers).weights_digest
        for folder in (one, same, other)
        for layers in (first, second)
    }
    assert digests["one", first] == digests["same", first] == digests["other", first]
    assert digests["one", second] == digests["same", second] != digests["other", second]
    assert digests["one", first] != digests["one", second]
    assert all(len(digest) == 64 for digest in digests.values())
    assert load(one, first).model_digest == load(other, second).model_digest
    wider = write_hugging_face(tmp_path / "wider", TinyModel(intermediate_size=128))
    assert load(wider, first).model_digest != load(one, first).model_digest


@pytest.mark.parametrize("is_tied", [False, True])
def test_each_layer_has_the_same_digest_wherever_the_model_is_cut(
    tmp_path: Path, is_tied: bool
) -> None:
    folder = write_hugging_face(tmp_path, TinyModel(tied_head=is_tied))

    def digests(*cuts: tuple[int, int]) -> list[str]:
        return [digest for layers in cuts for digest in load(folder, layers).layer_digests]

    whole = digests((0, 4))
    assert len(set(whole)) == 4
    assert digests((0, 2), (2, 4)) == digests((0, 1), (1, 2), (2, 4)) == whole


def test_weights_in_another_arithmetic_have_another_name(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, TinyModel())
    names = {
        load(folder, (0, 2), number_format=number_format, wire=wire).weights_digest
        for number_format, wire in [("fp32", "f32"), *(("bf16", wire) for wire in WIRES)]
    }
    assert len(names) == 1 + len(WIRES)


def test_a_stage_can_be_made_slow(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, TinyModel())
    settings = StageSettings(
        model=folder, name="tiny", first_layer=0, end_layer=2, listen="", slow_down=1.5
    )
    assert isinstance(load_model(settings).engine, SlowedEngine)


def test_a_stage_with_a_manifest_loads_no_other_bytes(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "model", TinyModel())
    manifest = tmp_path / "manifest.json"
    write_manifest(make_manifest(open_checkpoint(folder)), manifest)
    checked = load(folder, (0, 2), manifest=manifest)
    assert checked.weights_digest == load(folder, (0, 2)).weights_digest
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    place = open_checkpoint(folder).place("model.layers.1.mlp.up_proj.weight")
    content[place.offset] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ManifestMismatch, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, (0, 2), manifest=manifest)
    load(folder, (2, 4), manifest=manifest)


def test_a_stage_opens_its_own_sealed_layers_alone(tmp_path: Path) -> None:
    plain = write_hugging_face(tmp_path / "plain", TinyModel())
    sealed = seal_for_stages(plain, tmp_path / "sealed")
    keys = tmp_path / "keys"
    identity_key = write_identity(keys, "stage-0")
    public = read_identity(identity_key).public
    grant = grant_for(plain, public, 0, 2)
    rewrap(sealed.folder, owner=sealed.owner, grants={"stage-0": grant})
    sealer = keys / "owner.pub"
    sealer.write_text(str(sealed.owner.public))
    settings = {"sealer": sealer, "identity_key": identity_key}
    loaded = load(sealed.folder, (0, 2), **settings)
    assert loaded.weights_digest == load(plain, (0, 2)).weights_digest
    with pytest.raises(KeyRefused, match="'layer-2'"):
        load(sealed.folder, (1, 3), **settings)
    with pytest.raises(SealBroken, match="is not sealed"):
        load(plain, (0, 2), **settings)


def test_the_arrays_that_are_computed_with_are_watched(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, TinyModel())
    settings = StageSettings(model=folder, name="tiny", first_layer=0, end_layer=2, listen="")
    loaded = load_model(settings)
    assert isinstance(loaded.engine, Engine)
    arrays = loaded.engine.weight_arrays
    num_arrays = sum(array.nbytes > 0 for array in arrays.values())
    assert sum(array.nbytes for array in arrays.values()) == loaded.manifest.weights_bytes
    assert set(islice(loaded.watch.check(), num_arrays)) == {""}
    arrays["panels"][3] ^= 1
    assert "panels" in islice(loaded.watch.check(), num_arrays)
