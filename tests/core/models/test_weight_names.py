from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from core.errors import CorruptWeights
from core.models.llama.weight_names import (
    LayerWeights,
    model_sizes,
    read_embedding,
    read_embedding_rows,
    read_head,
    read_head_rows,
    read_layer,
    split_halves,
)
from core.models.registry import load_config
from core.tokens.tokenizer import load_tokenizer
from core.weights.open import open_checkpoint
from services.local.fetch import resolve_model
from tests.support.models import (
    TINY_MODELS,
    TinyModel,
    Weights,
    interleave,
    random_weights,
    write_gguf,
    write_hugging_face,
    write_llama2c,
)
from tests.support.transformers_models import LAYER_NAMES, load_gguf_model, transformers_model


def _assert_layer(found: LayerWeights, weights: Weights, layer: int) -> None:
    assert LAYER_NAMES.keys() == LayerWeights.__dataclass_fields__.keys()
    for field, name in LAYER_NAMES.items():
        array, expected = getattr(found, field), weights.get(f"model.layers.{layer}.{name}")
        if expected is None:
            assert array is None, field
        else:
            assert np.array_equal(array, expected), field
            assert array.dtype == np.float32
            assert array.flags.c_contiguous


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_layers_embedding_and_head_come_in_the_hugging_face_order(
    tmp_path: Path, name: str, kind: str
) -> None:
    model = TINY_MODELS[name]
    if kind == "gguf":
        if name == "qwen2-windows":
            model = TINY_MODELS["qwen2"]  # a Qwen GGUF cannot say which layers have windows
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model))
    else:
        checkpoint = open_checkpoint(write_hugging_face(tmp_path, model))
    config, weights = load_config(checkpoint), random_weights(model)
    for layer in range(model.num_layers):
        _assert_layer(read_layer(checkpoint, config, layer), weights, layer)
    embedding = weights["model.embed_tokens.weight"]
    head = read_head(checkpoint, config)
    assert np.array_equal(read_embedding(checkpoint, config), embedding)
    assert np.array_equal(head.head_VH, weights.get("lm_head.weight", embedding))
    assert np.array_equal(head.final_norm_H, weights["model.norm.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_layers_come_in_the_hugging_face_order(tmp_path: Path, tied: bool) -> None:
    model = TinyModel(tied_head=tied)
    checkpoint = open_checkpoint(write_llama2c(tmp_path / "m.bin", model))
    config, weights = load_config(checkpoint), random_weights(model)
    _assert_layer(read_layer(checkpoint, config, 3), weights, 3)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert np.array_equal(read_head(checkpoint, config).head_VH, weights[head])


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "llama2c"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_come_in_parts_too(tmp_path: Path, kind: str, tied: bool) -> None:
    model = TinyModel(tied_head=tied)
    writers = {
        "gguf": lambda: write_gguf(
            tmp_path / "m.gguf", model, block_type=GGMLQuantizationType.Q8_0
        ),
        "safetensors": lambda: write_hugging_face(tmp_path / "m", model, dtype="BF16"),
        "llama2c": lambda: write_llama2c(tmp_path / "m.bin", model),
    }
    checkpoint = open_checkpoint(writers[kind]())
    config = load_config(checkpoint)
    whole = read_embedding(checkpoint, config), read_head(checkpoint, config).head_VH
    for read_rows, expected in zip((read_embedding_rows, read_head_rows), whole, strict=True):
        before = checkpoint.bytes_read
        parts = list(read_rows(checkpoint, config, count=100))
        assert max(map(len, parts)) <= 100 < len(expected)
        np.testing.assert_array_equal(np.concatenate(parts), expected)
        assert checkpoint.bytes_read - before <= expected.nbytes


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "qwen2"])
def test_transformers_reads_the_same_rotary_order_from_a_gguf(tmp_path: Path, name: str) -> None:
    model = TINY_MODELS[name]
    vocabulary = {"tokenizer.ggml.tokens": [str(number) for number in range(model.vocab_size)]}
    path = write_gguf(tmp_path / "m.gguf", model, extra=vocabulary)
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint)
    theirs = load_gguf_model(path).state_dict()
    weights = {name: values.numpy() for name, values in theirs.items()}
    for layer in range(model.num_layers):
        _assert_layer(read_layer(checkpoint, config, layer), weights, layer)


def test_splitting_halves_undoes_interleaving() -> None:
    rows = np.arange(4 * 6 * 3, dtype=np.float32).reshape(24, 3)
    assert np.array_equal(split_halves(interleave(rows, num_heads=4), num_heads=4), rows)
    head = np.arange(6, dtype=np.float32)  # pairs (0, 1) (2, 3) (4, 5)
    assert split_halves(head, num_heads=1).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "llama2c"])
@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_known_before_anything_is_read(tmp_path: Path, kind: str, tied: bool) -> None:
    model = TinyModel(tied_head=tied)
    writers = {
        "gguf": lambda: write_gguf(
            tmp_path / "m.gguf", model, block_type=GGMLQuantizationType.Q8_0
        ),
        "safetensors": lambda: write_hugging_face(tmp_path / "m", model, dtype="BF16"),
        "llama2c": lambda: write_llama2c(tmp_path / "m.bin", model),
    }
    checkpoint = open_checkpoint(writers[kind]())
    config, weights = load_config(checkpoint), random_weights(model)
    sizes = model_sizes(checkpoint, config)
    assert checkpoint.bytes_read == 0
    for layer, size in enumerate(sizes.layers):
        before = checkpoint.bytes_read
        read_layer(checkpoint, config, layer)
        assert checkpoint.bytes_read - before == size.file_bytes
        prefix = f"model.layers.{layer}."
        values = [weights[name].size for name in weights if name.startswith(prefix)]
        assert size.num_parameters == sum(values)
    before = checkpoint.bytes_read
    read_embedding(checkpoint, config)
    assert checkpoint.bytes_read - before == sizes.embedding.file_bytes
    before = checkpoint.bytes_read
    read_head(checkpoint, config)
    assert checkpoint.bytes_read - before == sizes.head.file_bytes
    assert sizes.head.num_parameters == sizes.embedding.num_parameters + model.hidden_size


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hugging_face(tmp_path, TINY_MODELS["llama"]))
    config = load_config(checkpoint)
    other = load_config(
        open_checkpoint(write_hugging_face(tmp_path / "other", TinyModel(intermediate_size=128)))
    )
    for call in (lambda: read_layer(checkpoint, other, 0), lambda: model_sizes(checkpoint, other)):
        with pytest.raises(CorruptWeights, match=r"has shape \(96, 64\)"):
            call()
    assert config != other


@pytest.mark.model
def test_the_default_model_reads_as_the_library_decodes_it() -> None:
    import gguf

    path = resolve_model("smollm2-135m-instruct")
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    library = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in library.values():
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(checkpoint.read(tensor.name), decoded)
    layer = read_layer(checkpoint, config, 17)
    for field, name, heads in (("q_PH", "attn_q", 9), ("k_KH", "attn_k", 3)):
        tensor = library[f"blk.17.{name}.weight"]
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(interleave(getattr(layer, field), num_heads=heads), decoded)


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "text", "following"),
    [
        ("smollm2-135m-instruct", "The capital of France is", "Paris"),
        pytest.param(
            "stories15m",
            "Once upon a time, there was a little",
            "girl",
            marks=pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
        ),
    ],
)
def test_real_models_speak_english(name: str, text: str, following: str) -> None:
    """A wrong rotary order, a wrong tie or a wrong scale would all make noise of this."""
    import torch

    path = resolve_model(name)
    checkpoint = open_checkpoint(path)
    model = transformers_model(checkpoint, load_config(checkpoint))
    tokenizer = load_tokenizer(path)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode(text)])).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]).strip() == following
