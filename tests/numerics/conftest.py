"""The real models that numerics are measured on, and their reference implementation."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.models.llama.config import LlamaConfig
from core.models.registry import load_config
from core.tokens.tokenizer import Tokenizer, load_tokenizer
from core.weights.checkpoint import Checkpoint
from core.weights.open import open_checkpoint
from services.local.fetch import resolve_model
from tests.support.chain import Chain

DATA = Path(__file__).parents[1] / "data"


class RealModel:
    """A real model's file, opened, with at most one chain of engines alive at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.config: LlamaConfig = load_config(self.checkpoint)
        self.tokenizer: Tokenizer = load_tokenizer(path)

    def chain(self, **options: Any) -> Chain:
        gc.collect()
        return Chain(self.checkpoint, self.config, **options)


class TransformersModel:
    """transformers in fp32: what every number here is compared with."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    def logits(self, token_ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits [T, V] of one text."""
        import torch

        with torch.inference_mode():
            logits = self._model(torch.tensor([token_ids])).logits[0]
        return logits.float().numpy()


@pytest.fixture(scope="session")
def smollm2() -> RealModel:
    return RealModel(resolve_model("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def stories15m() -> RealModel:
    return RealModel(resolve_model("stories15m"))


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: RealModel) -> TransformersModel:
    """SmolLM2 by transformers, from the same file but by transformers' own GGUF reader."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2.path.parent, gguf_file=smollm2.path.name, dtype=torch.float32
    )
    return TransformersModel(model)


@pytest.fixture(scope="session")
def wikitext_ids(smollm2: RealModel) -> npt.NDArray[np.int32]:
    """WikiText-2's test text as SmolLM2's ids, without BOS."""
    text = (DATA / "wikitext2_test.txt").read_text(encoding="utf-8")
    return np.array(smollm2.tokenizer.encode(text[:400_000], add_bos=False), np.int32)
