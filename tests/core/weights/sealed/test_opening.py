"""A sealed model reads as the plain one, for whoever may read it, and for nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from core.errors import InvalidInput, KeyRefused, NotFound, SealBroken
from core.weights.checkpoint import Checkpoint
from core.weights.gguf import GgufCheckpoint
from core.weights.open import open_checkpoint
from core.weights.sealed.identity import SealKeys, make_identity
from core.weights.sealed.opening import open_sealed
from tests.support.models import (
    TINY_MODELS,
    TinyModel,
    write_gguf,
    write_hugging_face,
    write_llama2c,
)
from tests.support.sealed_models import SealedModel, seal_for_stages

Q4_0 = GGMLQuantizationType.Q4_0
# An embedding of more than one chunk.
MODEL = TinyModel(vocab_size=3000, tied_head=True)
WRITERS: dict[str, Callable[[Path], Path]] = {
    "gguf": lambda folder: write_gguf(folder / "m.gguf", MODEL),
    "gguf-q4": lambda folder: write_gguf(folder / "m.gguf", MODEL, block_type=Q4_0),
    "gguf-rope": lambda folder: write_gguf(folder / "m.gguf", TINY_MODELS["llama3"]),
    "safetensors": lambda folder: write_hugging_face(folder / "m", MODEL, num_shards=3),
    "llama2c": lambda folder: write_llama2c(folder / "m.bin", TinyModel()),
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", MODEL, block_type=Q4_0)


@pytest.fixture
def sealed(plain: Path, tmp_path: Path) -> SealedModel:
    return seal_for_stages(plain, tmp_path / "sealed")


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensor_names:
        checkpoint.read(name)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_sealed_model_reads_as_the_plain_one(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    sealed = seal_for_stages(path, tmp_path / "sealed")
    plain, opened = open_checkpoint(path), open_sealed(sealed.folder, sealed.owner_keys)
    assert (opened.format, opened.tensor_names) == (plain.format, plain.tensor_names)
    assert dict(opened.metadata).keys() == dict(plain.metadata).keys()
    for name in plain.tensor_names:
        np.testing.assert_array_equal(opened.read(name), plain.read(name))
    names = plain.tensor_names
    assert opened.bytes_read == plain.bytes_read
    assert opened.digest_of(names) == plain.digest_of(names)
    opened.close()


def test_rows_across_chunks_are_read_as_from_the_plain_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", MODEL)
    sealed = seal_for_stages(path, tmp_path / "sealed")
    plain, opened = open_checkpoint(path), open_sealed(sealed.folder, sealed.owner_keys)
    for first, count in [(0, 1), (1000, 100), (1023, 2), (2999, 1)]:
        expected = plain.read_rows("token_embd.weight", first=first, count=count)
        found = opened.read_rows("token_embd.weight", first=first, count=count)
        np.testing.assert_array_equal(found, expected)


def test_blocks_of_4_bits_come_as_the_file_has_them(plain: Path, sealed: SealedModel) -> None:
    opened, whole = open_sealed(sealed.folder, sealed.keys(0)), open_checkpoint(plain)
    assert isinstance(opened, GgufCheckpoint)
    assert isinstance(whole, GgufCheckpoint)
    found, expected = (
        checkpoint.read_nibbles("blk.1.ffn_up.weight", first=0, count=96)
        for checkpoint in (opened, whole)
    )
    np.testing.assert_array_equal(found.integers_NK, expected.integers_NK)


def test_a_stage_opens_its_own_layers_and_no_others(sealed: SealedModel) -> None:
    first, last = (open_sealed(sealed.folder, sealed.keys(stage)) for stage in range(2))
    for name, may_first, may_last in [
        ("blk.0.attn_q.weight", True, False),
        ("blk.1.ffn_norm.weight", True, False),
        ("blk.2.attn_q.weight", False, True),
        ("output_norm.weight", False, True),
        ("token_embd.weight", True, True),  # which is the head, too
    ]:
        for checkpoint, may in ((first, may_first), (last, may_last)):
            if may:
                checkpoint.read(name)
            else:
                with pytest.raises(KeyRefused, match="holds no key for"):
                    checkpoint.read(name)


def test_whoever_holds_no_key_sees_sizes_and_no_weights(sealed: SealedModel) -> None:
    stranger = SealKeys(sealer=sealed.owner.public, identity=make_identity())
    for keys in (stranger, SealKeys(sealer=sealed.owner.public)):
        checkpoint = open_sealed(sealed.folder, keys)
        assert checkpoint.shape("token_embd.weight") == (3000, 64)
        with pytest.raises(KeyRefused):
            checkpoint.read("token_embd.weight")


def test_only_the_trusted_sealer_is_believed(sealed: SealedModel) -> None:
    somebody_else = SealKeys(sealer=make_identity().public, identity=sealed.stages[0])
    with pytest.raises(SealBroken, match="not signed by the sealer that is trusted"):
        open_sealed(sealed.folder, somebody_else)


def test_whoever_expects_a_sealed_model_opens_no_plain_one(
    plain: Path, sealed: SealedModel
) -> None:
    for path in (plain, plain.parent):
        with pytest.raises(SealBroken, match="is not sealed"):
            open_checkpoint(path, keys=sealed.keys(0))
    with pytest.raises(NotFound):
        open_checkpoint(plain.with_name("nothing"), keys=sealed.keys(0))


def test_without_keys_a_sealed_model_asks_for_the_sealer(sealed: SealedModel) -> None:
    with pytest.raises(InvalidInput, match="public key of whoever has sealed"):
        open_checkpoint(sealed.folder)


def test_nothing_sealed_holds_plaintext(plain: Path, sealed: SealedModel) -> None:
    checkpoint = open_checkpoint(plain)
    contents = [path.read_bytes() for path in sealed.folder.iterdir()]
    for name in checkpoint.tensor_names:
        place = checkpoint.place(name)
        marker = plain.read_bytes()[place.offset :][:64]
        assert not any(marker in content for content in contents), name
