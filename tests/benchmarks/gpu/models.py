"""The models that are measured: real weights where they lie in the cache, else random ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.models.llama.config import LlamaConfig
from core.models.registry import load_config
from core.weights.checkpoint import Checkpoint
from core.weights.open import open_checkpoint
from tests.support.models import TinyModel, hugging_face_config

# Sizes of qwen2.5-coder-1.5b and of Llama 3.1 8B.
SHAPES = {
    "qwen2.5-coder-1.5b": TinyModel(
        family="qwen2",
        num_layers=28,
        hidden_size=1536,
        intermediate_size=8960,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        vocab_size=151_936,
        context_length=32_768,
        rope_theta=1e6,
        tied_head=True,
    ),
    "llama-3.1-8b": TinyModel(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14_336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        context_length=131_072,
        rope_theta=500_000.0,
    ),
}
CACHE = Path("~/.cache/penstock/models")
REAL_FOLDERS = {"qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-instruct"}


class RandomCheckpoint:
    """A model of any size without a file: its tensors repeat one block of random numbers."""

    format = "safetensors"
    path = Path("random-weights")
    bytes_read = 0

    def __init__(self, model: TinyModel) -> None:
        self.metadata: Mapping[str, Any] = hugging_face_config(model)
        self._shapes = _shapes(model)
        self._block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
        self._arrays: dict[tuple[int, ...], npt.NDArray[np.float32]] = {}

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def size_bytes(self, name: str) -> int:
        return 2 * math.prod(self._shapes[name])

    def digest_of(self, names: Iterable[str]) -> str:
        return "random"

    def read(self, name: str) -> npt.NDArray[np.float32]:
        shape = self._shapes[name]
        if shape not in self._arrays:
            self._arrays[shape] = self._make(shape)
        return self._arrays[shape]

    def read_rows(self, name: str, *, first: int, count: int) -> npt.NDArray[np.float32]:
        return self.read(name)[first : first + count]

    def close(self) -> None:
        return

    def _make(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return np.resize(self._block, shape) / np.float32(math.sqrt(shape[1]))


def find_checkpoint(name: str) -> tuple[Checkpoint, str]:
    """The model's weights, and whether they are "real" or "random"."""
    folder = CACHE.expanduser() / REAL_FOLDERS.get(name, name)
    for path in (*sorted(folder.glob("*.gguf")), folder):
        if path.is_file() or (path / "config.json").exists():
            return open_checkpoint(path), "real"
    return RandomCheckpoint(SHAPES[name]), "random"


def config_of(checkpoint: Checkpoint) -> LlamaConfig:
    return load_config(checkpoint)


def _shapes(model: TinyModel) -> dict[str, tuple[int, ...]]:
    hidden, inner = model.hidden_size, model.intermediate_size
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if model.family == "qwen2":
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            layer[f"self_attn.{name}_proj.bias"] = (rows,)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (model.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not model.tied_head:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    for index in range(model.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes
