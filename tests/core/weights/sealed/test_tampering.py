"""Whoever owns the storage can break a sealed model, and never change it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import SealBroken
from core.weights.sealed.chunks import CHUNK_BYTES, TAG_BYTES
from core.weights.sealed.opening import open_sealed
from tests.core.weights.sealed.test_opening import read_all
from tests.support.models import TinyModel, write_gguf, write_servable
from tests.support.sealed_models import SealedModel, seal_for_stages

# An embedding of more than two chunks.
MODEL = TinyModel(vocab_size=3000, num_layers=2, tied_head=True)
LAYERS = ((0, 1), (1, 2))
Changed = Callable[[bytearray], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> SealedModel:
    folder = tmp_path_factory.mktemp("model")
    plain = write_gguf(folder / "m.gguf", MODEL)
    return seal_for_stages(plain, folder / "sealed", layers=LAYERS)


@pytest.fixture
def copy(original: SealedModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path / "copy"))


def weights_of(folder: Path) -> Path:
    return folder / "m.gguf.sealed"


def change(path: Path, how: Changed) -> None:
    content = bytearray(path.read_bytes())
    how(content)
    path.write_bytes(content)


def refuses(folder: Path, original: SealedModel, match: str | None = None) -> None:
    with pytest.raises(SealBroken, match=match):
        read_all(open_sealed(folder, original.owner_keys))


def chunk_offset(original: SealedModel, chunk: int) -> int:
    """Of the embedding, whose chunks are the longest run of one tensor."""
    checkpoint = open_sealed(original.folder, original.owner_keys)
    names = sorted(checkpoint.tensor_names, key=lambda name: checkpoint.place(name).offset)
    before = names[: names.index("token_embd.weight")]
    chunks_before = sum(-(-checkpoint.size_bytes(name) // CHUNK_BYTES) for name in before)
    start = checkpoint.place("token_embd.weight").offset + chunks_before * TAG_BYTES
    return start + chunk * (CHUNK_BYTES + TAG_BYTES)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), header=st.booleans())
def test_a_flipped_bit_anywhere_is_refused(
    original: SealedModel, copy: Path, where: float, bit: int, header: bool
) -> None:
    path = copy / "sealed.header" if header else weights_of(copy)
    content = path.read_bytes()

    def flip(data: bytearray) -> None:
        data[int(where * len(data))] ^= 1 << bit

    change(path, flip)
    refuses(copy, original)
    path.write_bytes(content)


def test_chunks_of_one_tensor_cannot_change_places(original: SealedModel, copy: Path) -> None:
    first, second = chunk_offset(original, 0), chunk_offset(original, 1)
    size = CHUNK_BYTES + TAG_BYTES

    def swap(data: bytearray) -> None:
        one, other = data[first : first + size], data[second : second + size]
        data[first : first + size], data[second : second + size] = other, one

    change(weights_of(copy), swap)
    refuses(copy, original, match="chunk 0 of 3 of 'token_embd.weight'")


def test_a_chunk_cannot_be_repeated_in_place_of_the_next(original: SealedModel, copy: Path) -> None:
    first, second = chunk_offset(original, 0), chunk_offset(original, 1)
    size = CHUNK_BYTES + TAG_BYTES

    def repeat(data: bytearray) -> None:
        data[second : second + size] = data[first : first + size]

    change(weights_of(copy), repeat)
    refuses(copy, original, match="chunk 1 of 3")


@pytest.mark.parametrize("num_bytes", [1, TAG_BYTES, CHUNK_BYTES])
def test_a_file_cut_short_or_lengthened_is_refused(
    original: SealedModel, copy: Path, num_bytes: int
) -> None:
    content = weights_of(copy).read_bytes()
    weights_of(copy).write_bytes(content[:-num_bytes])
    refuses(copy, original, match="were sealed")
    weights_of(copy).write_bytes(content + bytes(num_bytes))
    refuses(copy, original, match="were sealed")


@pytest.mark.parametrize("file", ["sealed.header", "m.gguf.sealed"])
def test_nothing_of_another_version_of_the_same_model_fits(
    original: SealedModel, copy: Path, tmp_path: Path, file: str
) -> None:
    plain = original.folder.parent / "m.gguf"
    other = seal_for_stages(
        plain,
        tmp_path / "other",
        layers=LAYERS,
        version="2",
        owner=original.owner,
        stages=original.stages,
    )
    shutil.copyfile(other.folder / file, copy / file)
    refuses(copy, original)


def test_files_beside_the_weights_are_those_that_were_sealed(tmp_path: Path) -> None:
    plain = write_servable(tmp_path / "plain")
    sealed = seal_for_stages(plain, tmp_path / "sealed")
    tokenizer = sealed.folder / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(content.replace(b"hello", b"jello"))
    refuses(sealed.folder, sealed, match=r"tokenizer\.json has the SHA-256")
    tokenizer.unlink()
    refuses(sealed.folder, sealed, match=r"tokenizer\.json is missing")
    tokenizer.write_bytes(content)
    (sealed.folder / "chat_template.jinja").write_text("{{ 'mine' }}")
    refuses(sealed.folder, sealed, match="'chat_template.jinja', which was not sealed")
