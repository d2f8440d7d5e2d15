from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import CorruptWeights, NotFound
from core.weights.safetensors import SafetensorsCheckpoint
from tests.support.models import (
    TINY_MODELS,
    bf16_bits,
    random_weights,
    write_hugging_face,
    write_raw_safetensors,
)

MODEL = TINY_MODELS["qwen2"]
NAME = "model.layers.2.mlp.up_proj.weight"


def _folder(tmp_path: Path, header: object = None, data: bytes = b"", **files: object) -> Path:
    """A folder with config.json, a raw safetensors file, and JSON files by name."""
    (tmp_path / "config.json").write_text("{}")
    if header is not None:
        write_raw_safetensors(tmp_path / "model.safetensors", header, data)
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(json.dumps(content))
    return tmp_path


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize("num_shards", [1, 3])
def test_whole_and_sharded_folders_read_alike(tmp_path: Path, num_shards: int) -> None:
    folder = write_hugging_face(tmp_path, MODEL, num_shards=num_shards)
    checkpoint = SafetensorsCheckpoint(folder)
    weights = random_weights(MODEL)
    assert set(checkpoint.tensor_names) == set(weights)
    for name, values in weights.items():
        assert np.array_equal(checkpoint.read(name), values)
        assert checkpoint.shape(name) == values.shape
    assert checkpoint.metadata["model_type"] == "qwen2"
    checkpoint.close()


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    _folder(tmp_path)
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    save_file({"a": values, "b": values.astype(np.float16)}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert np.array_equal(checkpoint.read("a"), values)
    assert np.array_equal(checkpoint.read("b"), values.astype(np.float16).astype(np.float32))


def test_half_formats_are_widened_exactly(tmp_path: Path) -> None:
    values = random_weights(MODEL)[NAME]
    half = SafetensorsCheckpoint(write_hugging_face(tmp_path / "f16", MODEL, dtype="F16"))
    brain = SafetensorsCheckpoint(write_hugging_face(tmp_path / "bf16", MODEL, dtype="BF16"))
    assert np.array_equal(half.read(NAME), values.astype(np.float16).astype(np.float32))
    widened = (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(brain.read(NAME), widened)
    assert brain.size_bytes(NAME) == brain.bytes_read == 2 * values.size


def test_the_digest_of_what_was_read_names_these_tensors_and_no_others(tmp_path: Path) -> None:
    def digest_of(folder: str, weights: dict[str, Any], *names: str) -> str:
        (tmp_path / folder).mkdir()
        _folder(tmp_path / folder)
        save_file(weights, tmp_path / folder / "model.safetensors")
        checkpoint = SafetensorsCheckpoint(tmp_path / folder)
        for name in names:
            checkpoint.read(name)
        return checkpoint.digest_of(names)

    weights = {name: np.full((4, 4), at, np.float32) for at, name in enumerate("abc")}
    tuned = weights | {"c": weights["c"] + np.eye(4, dtype=np.float32)}
    assert digest_of("1", weights, "a", "b") == digest_of("2", tuned, "a", "b")
    assert digest_of("3", weights, "a", "c") != digest_of("4", tuned, "a", "c")
    assert digest_of("5", weights, "a", "b") != digest_of("6", weights, "b", "a")


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"t": _entry()}, bytes(16))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    SafetensorsCheckpoint(folder).close()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptWeights, match=r"model\.safetensors"):
            SafetensorsCheckpoint(folder)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ([], "does not hold a JSON object"),
        ({"t": 7}, "is not an object"),
        ({"t": _entry(dtype="F33")}, "unknown type 'F33'"),
        ({"t": _entry(dtype=["F32"])}, "unknown type"),
        ({"t": _entry(shape=None)}, "malformed"),
        ({"t": _entry(shape=[2, -2])}, "malformed"),
        ({"t": _entry(shape=[2, True])}, "malformed"),
        ({"t": _entry(shape=[2, 2.0])}, "malformed"),
        ({"t": _entry(data_offsets=[0])}, "malformed"),
        ({"t": _entry(data_offsets=[-16, 0])}, "malformed"),
        ({"t": _entry(data_offsets=[16, 0])}, "do not fit its shape"),
        ({"t": _entry(shape=[2, 3])}, "do not fit its shape"),
        ({"t": _entry(shape=[2**62, 2])}, "do not fit its shape"),
        ({"t": _entry(shape=[2**63, 2])}, "malformed"),
        ({"t": _entry(shape=[1] * 9)}, "malformed"),
        ({"t": _entry(data_offsets=[16, 32])}, "is it cut short?"),
        ({"t": _entry(), "u": _entry()}, "overlapping"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: object, reason: str) -> None:
    with pytest.raises(CorruptWeights) as refusal:
        SafetensorsCheckpoint(_folder(tmp_path, header, bytes(16)))
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"9" * 5000]
)
def test_json_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    _folder(tmp_path, {"t": _entry()}, bytes(16))
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CorruptWeights, match="no valid JSON"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CorruptWeights, match=r"config\.json has no valid JSON"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("length", [2**63, 100_000_001, 100])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    _folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptWeights, match="claims a header"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"t": "../model.safetensors"}}, "not a file of the folder"),
        ({"weight_map": {"t": "/etc/passwd"}}, "not a file of the folder"),
        ({"weight_map": {"t": 5}}, "not a file of the folder"),
        ({"weight_map": {"t": "a\0b"}}, "not a file of the folder"),
        ({"weight_map": {"t": "\ud800"}}, "not a file of the folder"),
        ({"weight_map": {"other": "model.safetensors"}}, "lacks 'other'"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: object, reason: str) -> None:
    folder = _folder(tmp_path, {"t": _entry()}, bytes(16), model__safetensors__index__json=index)
    with pytest.raises(CorruptWeights, match=reason):
        SafetensorsCheckpoint(folder)


def test_a_missing_shard_is_not_found(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, MODEL, num_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFound, match="00002-of-00002"):
        SafetensorsCheckpoint(folder)


def test_shards_that_repeat_a_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, MODEL)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(content)
    with pytest.raises(CorruptWeights, match="repeats"):
        SafetensorsCheckpoint(folder)


def test_a_folder_without_weights_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no safetensors file"):
        SafetensorsCheckpoint(_folder(tmp_path))


def test_other_types_are_refused_only_when_read(tmp_path: Path) -> None:
    header = {"ids": _entry(dtype="I64", shape=[2])}
    checkpoint = SafetensorsCheckpoint(_folder(tmp_path, header, bytes(16)))
    with pytest.raises(CorruptWeights, match="'ids' is of type I64"):
        checkpoint.read("ids")
    checkpoint.close()
