"""A model that is opened with its manifest is that model, byte for byte, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.errors import InvalidInput, ManifestMismatch, NotFound
from core.weights.manifest import (
    make_manifest,
    open_checked,
    read_manifest,
    verify,
    write_manifest,
)
from core.weights.open import open_checkpoint
from tests.support.models import TinyModel, write_gguf, write_llama2c, write_servable

WRITERS: dict[str, Callable[[Path], Path]] = {
    "gguf": lambda folder: write_gguf(folder / "m.gguf", TinyModel()),
    "safetensors": lambda folder: write_servable(folder / "m"),
    "llama2c": lambda folder: write_llama2c(folder / "m.bin", TinyModel()),
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return WRITERS["gguf"](tmp_path)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_an_unchanged_model_is_read_as_without_a_manifest(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    plain = open_checkpoint(path)
    write_manifest(make_manifest(plain), tmp_path / "manifest.json")
    manifest = read_manifest(tmp_path / "manifest.json")
    checked = open_checked(path, manifest)
    for name in plain.tensor_names:
        np.testing.assert_array_equal(checked.read(name), plain.read(name))
    assert checked.digest_of(plain.tensor_names) == plain.digest_of(plain.tensor_names)
    assert verify(path, manifest) >= plain.bytes_read


def test_a_flipped_byte_is_named_with_both_digests(plain: Path) -> None:
    checkpoint = open_checkpoint(plain)
    manifest = make_manifest(checkpoint)
    name = "blk.2.attn_v.weight"
    flip(plain, checkpoint.place(name).offset + 5)
    changed = make_manifest(open_checkpoint(plain))
    before, after = (
        next(one.sha256 for one in each.files[0].tensors if one.name == name)
        for each in (manifest, changed)
    )
    expected = f"'{re.escape(name)}' has the SHA-256 {after}; the manifest has {before}"
    with pytest.raises(ManifestMismatch, match=expected):
        open_checked(plain, manifest).read_rows(name, first=20, count=1)
    with pytest.raises(ManifestMismatch, match=expected):
        verify(plain, manifest)


def test_only_what_is_read_is_hashed(plain: Path) -> None:
    checkpoint = open_checkpoint(plain)
    manifest = make_manifest(checkpoint)
    flip(plain, checkpoint.place("blk.2.attn_v.weight").offset)
    open_checked(plain, manifest).read("blk.1.attn_v.weight")


def test_a_changed_header_or_size_is_refused_at_once(plain: Path) -> None:
    manifest = make_manifest(open_checkpoint(plain))
    flip(plain, 30)
    with pytest.raises(ManifestMismatch, match="its first"):
        open_checked(plain, manifest)
    plain.write_bytes(plain.read_bytes()[:-1])
    with pytest.raises(ManifestMismatch, match="in its manifest it has"):
        open_checked(plain, manifest)


def test_a_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    path = WRITERS["safetensors"](tmp_path)
    manifest = make_manifest(open_checkpoint(path))
    flip(path / "tokenizer.json", 100)
    with pytest.raises(ManifestMismatch, match=r"tokenizer\.json has the SHA-256"):
        open_checked(path, manifest)
    (path / "tokenizer.json").unlink()
    with pytest.raises(NotFound):
        open_checked(path, manifest)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "gguf", "files": [], "companions": {}}', "[" * 100_000],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InvalidInput, match="penstock manifest make"):
        read_manifest(tmp_path / "m.json")


def test_a_manifest_names_no_file_elsewhere(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_manifest(make_manifest(open_checkpoint(plain)), path)
    path.write_text(path.read_text().replace('"m.gguf"', '"../m.gguf"'))
    with pytest.raises(InvalidInput):
        read_manifest(path)
