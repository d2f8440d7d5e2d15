from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.errors import CorruptWeights, NotFound
from core.weights.open import open_checkpoint
from tests.core.weights.gguf_bytes import GgufBytes
from tests.support.models import (
    TinyModel,
    random_weights,
    write_gguf,
    write_hugging_face,
    write_llama2c,
)

MODEL = TinyModel(num_layers=1)


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "folder", MODEL)
    for path, expected in (
        (write_gguf(tmp_path / "m.gguf", MODEL), "gguf"),
        (write_gguf(tmp_path / "without-suffix", MODEL), "gguf"),
        (folder, "safetensors"),
        (write_llama2c(tmp_path / "m.bin", MODEL), "llama2c"),
    ):
        checkpoint = open_checkpoint(path)
        assert checkpoint.format == expected
        assert checkpoint.path == path
        checkpoint.close()


def test_a_folder_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", MODEL)
    assert open_checkpoint(tmp_path).path == path
    GgufBytes().write(tmp_path / "n.gguf")
    with pytest.raises(NotFound, match=r"m\.gguf, n\.gguf"):
        open_checkpoint(tmp_path)


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path / "none"):
        with pytest.raises(NotFound, match="No such file"):
            open_checkpoint(path)
    with pytest.raises(NotFound, match="neither config"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("m.gguf", b"", "is empty"),
        ("m.bin", b"", "is empty"),
        ("m.gguf", b"GG", "ends inside the magic"),
        ("m.gguf", b"ggml" + bytes(60), "does not begin with 'GGUF'"),
        ("model.safetensors", bytes(100), "give its folder"),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(100), "pickled"),
        ("m.pth", b"\x80\x02}q\x00." + bytes(100), "pickled"),
        ("m.bin", b"a text, and not a model at all, whatever its name may say", "llama2.c"),
        ("m.txt", b"a text, and not a model at all", "neither a GGUF file"),
    ],
)
def test_other_files_are_refused_with_a_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptWeights, match=reason):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("write", "name", "file"),
    [
        (write_gguf, "output_norm.weight", "m"),
        (write_llama2c, "rms_final", "m.bin"),
        (write_hugging_face, "model.norm.weight", "m/model.safetensors"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, write: Callable[[Path, TinyModel], Path], name: str, file: str, bad: float
) -> None:
    path = write(tmp_path / Path(file).parts[0], MODEL)
    norm = random_weights(MODEL)["model.norm.weight"]
    damaged = norm.copy()
    damaged[5] = bad
    content = (tmp_path / file).read_bytes()
    assert content.count(norm.tobytes()) == 1
    (tmp_path / file).write_bytes(content.replace(norm.tobytes(), damaged.tobytes()))
    with pytest.raises(CorruptWeights, match=rf"{file}: 1 of the 64 values of '{name}'"):
        open_checkpoint(path).read(name)


def test_big_weights_whose_sum_overflows_are_numbers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", MODEL)
    norm = random_weights(MODEL)["model.norm.weight"]
    content = path.read_bytes().replace(norm.tobytes(), np.full_like(norm, 3e38).tobytes())
    path.write_bytes(content)
    assert open_checkpoint(path).read("output_norm.weight").max() == np.float32(3e38)
