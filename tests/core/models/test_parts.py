"""Every tensor belongs to a part, and every stage needs exactly the parts that it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core.models.llama.parts import slice_parts, tensor_parts
from core.models.llama.weight_names import (
    read_embedding,
    read_head,
    read_layer,
)
from core.models.registry import load_config
from core.weights.open import open_checkpoint
from core.weights.sealed.opening import open_sealed
from tests.support.models import (
    TINY_MODELS,
    TinyModel,
    write_gguf,
    write_hugging_face,
    write_llama2c,
)
from tests.support.sealed_models import seal_for_stages

WRITERS: dict[str, Callable[[Path], Path]] = {
    "gguf-tied": lambda folder: write_gguf(folder / "m.gguf", TINY_MODELS["llama-tied"]),
    "gguf-rope": lambda folder: write_gguf(folder / "m.gguf", TINY_MODELS["llama3"]),
    "safetensors": lambda folder: write_hugging_face(folder / "m", TINY_MODELS["qwen3"]),
    "llama2c": lambda folder: write_llama2c(folder / "m.bin", TinyModel()),
}


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_stage_can_read_what_it_needs_with_the_keys_of_its_slice(
    kind: str, tmp_path: Path
) -> None:
    layers = ((0, 1), (1, 3), (3, 4))
    sealed = seal_for_stages(WRITERS[kind](tmp_path), tmp_path / "sealed", layers=layers)
    for stage, (first, end) in enumerate(layers):
        checkpoint = open_sealed(sealed.folder, sealed.keys(stage))
        config = load_config(checkpoint)
        for layer in range(first, end):
            read_layer(checkpoint, config, layer)
        if first == 0:
            read_embedding(checkpoint, config)
        if end == config.num_layers:
            read_head(checkpoint, config)


def test_parts_are_layers_the_embedding_the_head_and_the_rest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", TINY_MODELS["llama3"]))
    parts = tensor_parts(checkpoint)
    assert parts["blk.3.attn_q.weight"] == "layer-3"
    assert parts["token_embd.weight"] == "embedding"
    assert parts["output_norm.weight"] == parts["output.weight"] == "head"
    assert parts["rope_freqs.weight"] == "shared"


def test_the_last_stage_has_the_embedding_where_it_is_the_head(tmp_path: Path) -> None:
    for name, expected in (("llama-tied", True), ("llama", False)):
        checkpoint = open_checkpoint(write_gguf(tmp_path / f"{name}.gguf", TINY_MODELS[name]))
        parts = slice_parts(load_config(checkpoint), first_layer=3, end_layer=4)
        assert ("embedding" in parts) == expected
        assert parts >= {"layer-3", "head", "shared"}
