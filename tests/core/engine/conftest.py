"""Tiny models, opened, and chains of engines that are built once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gguf import GGMLQuantizationType

from core.kernels.arithmetic import Arithmetic
from core.models.llama.config import LlamaConfig
from core.models.registry import load_config
from core.weights.checkpoint import Checkpoint
from core.weights.open import open_checkpoint
from tests.support.chain import Chain
from tests.support.models import TINY_MODELS, TinyModel, write_gguf, write_hugging_face


class NibbleFile(NamedTuple):
    """A model in a GGUF file: most of its matrices in one block type, some in others."""

    model: TinyModel
    block_type: GGMLQuantizationType
    other_types: Mapping[str, GGMLQuantizationType]


MODELS = {name: model for name, model in TINY_MODELS.items() if name not in ("llama-tied",)} | {
    "llama-odd-sizes": TinyModel(
        hidden_size=72,
        intermediate_size=100,
        head_dim=48,
        num_heads=3,
        num_kv_heads=3,
        vocab_size=263,
        tied_head=True,
    ),
    "llama-head-128": TinyModel(
        hidden_size=96, head_dim=128, num_heads=6, num_kv_heads=2, num_layers=2
    ),
    "qwen3-many-queries": TinyModel(
        family="qwen3", hidden_size=70, head_dim=8, num_heads=14, num_kv_heads=1, num_layers=3
    ),
}


_Q8_0 = GGMLQuantizationType.Q8_0
# Files with weights of 4 bits: in all matrices, in some, and with heads that have to be padded.
NIBBLE_MODELS = {
    "llama-nibbles": NibbleFile(
        TinyModel(hidden_size=96, intermediate_size=160, head_dim=32, num_heads=3, num_kv_heads=1),
        GGMLQuantizationType.Q4_0,
        {},
    ),
    "llama-mixed": NibbleFile(
        TinyModel(vocab_size=263),
        GGMLQuantizationType.Q4_1,
        {
            "token_embd.weight": _Q8_0,
            "output.weight": _Q8_0,
            "blk.1.ffn_down.weight": _Q8_0,
            "blk.2.attn_v.weight": _Q8_0,
            "blk.3.ffn_up.weight": _Q8_0,
        },
    ),
    "qwen2-padded-nibbles": NibbleFile(
        TinyModel(family="qwen2", hidden_size=96, head_dim=24, tied_head=True),
        GGMLQuantizationType.Q4_1,
        {},
    ),
}


class OpenModel:
    """A tiny model on disk, and chains of engines over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.config: LlamaConfig = load_config(self.checkpoint)
        self._chains: dict[tuple[Any, ...], Chain] = {}

    def chain(
        self,
        *,
        num_stages: int,
        number_format: str = "fp32",
        wire: str = "f32",
        arithmetic: Arithmetic | None = None,
        keeps_log: bool = False,
    ) -> Chain:
        """A chain, with no sequence live, that tests share."""
        key = (num_stages, number_format, wire, arithmetic, keeps_log)
        if key not in self._chains:
            self._chains[key] = Chain(
                self.checkpoint,
                self.config,
                num_stages=num_stages,
                number_format=number_format,
                num_kv_blocks=128,
                max_rows=300,
                wire=wire,
                arithmetic=arithmetic,
                keeps_log=keeps_log,
            )
        self._chains[key].flush()
        return self._chains[key]


def _write(path: Path, name: str) -> Path:
    if name not in NIBBLE_MODELS:
        return write_hugging_face(path, MODELS[name])
    model, block_type, other_types = NIBBLE_MODELS[name]
    return write_gguf(
        path.with_suffix(".gguf"), model, block_type=block_type, other_types=other_types
    )


@pytest.fixture(scope="session")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OpenModel]:
    opened: dict[str, OpenModel] = {}

    def open_one(name: str) -> OpenModel:
        if name not in opened:
            path = tmp_path_factory.mktemp("engine") / name
            opened[name] = OpenModel(_write(path, name))
        return opened[name]

    return open_one
