from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from core.errors import CorruptWeights
from core.weights.llama2c import Llama2cCheckpoint
from tests.support.models import TinyModel, random_weights, write_llama2c

MODEL = TinyModel(num_layers=2, context_length=32)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_where_the_format_puts_it(tmp_path: Path, tied: bool) -> None:
    model = TinyModel(num_layers=2, context_length=32, tied_head=tied)
    checkpoint = Llama2cCheckpoint(write_llama2c(tmp_path / "m.bin", model))
    weights = random_weights(model)
    for ours, theirs in (
        ("token_embedding", "model.embed_tokens.weight"),
        ("layers.1.wv", "model.layers.1.self_attn.v_proj.weight"),
        ("layers.0.wo", "model.layers.0.self_attn.o_proj.weight"),
        ("layers.1.w1", "model.layers.1.mlp.gate_proj.weight"),
        ("layers.1.w2", "model.layers.1.mlp.down_proj.weight"),
        ("layers.1.w3", "model.layers.1.mlp.up_proj.weight"),
        ("layers.1.rms_ffn", "model.layers.1.post_attention_layernorm.weight"),
        ("rms_final", "model.norm.weight"),
    ):
        assert np.array_equal(checkpoint.read(ours), weights[theirs]), ours
    assert checkpoint.metadata["shared_classifier"] == tied
    assert ("wcls" in checkpoint.tensor_names) is not tied
    if not tied:
        assert np.array_equal(checkpoint.read("wcls"), weights["lm_head.weight"])
    checkpoint.close()


def test_only_the_bytes_read_are_counted(tmp_path: Path) -> None:
    checkpoint = Llama2cCheckpoint(write_llama2c(tmp_path / "m.bin", MODEL))
    checkpoint.read("layers.1.rms_att")
    assert checkpoint.bytes_read == checkpoint.size_bytes("layers.1.rms_att") == 4 * 64


@pytest.mark.parametrize("kept", [3, 27, 28, 1000, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_llama2c(tmp_path / "m.bin", MODEL)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptWeights, match=r"m\.bin"):
        Llama2cCheckpoint(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, 0), (0, -64), (1, 2**31 - 1), (2, 2**24), (3, 0), (3, 5), (4, 3), (5, 0), (6, -1)],
)
def test_headers_that_do_not_fit_are_refused(tmp_path: Path, field: int, value: int) -> None:
    path = write_llama2c(tmp_path / "m.bin", MODEL)
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, 4 * field, value)
    path.write_bytes(content)
    with pytest.raises(CorruptWeights, match=r"m\.bin"):
        Llama2cCheckpoint(path)


def test_later_versions_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 1) + bytes(248))
    with pytest.raises(CorruptWeights, match="version 1 or 2"):
        Llama2cCheckpoint(path)
