"""The real models that numerics are measured on, and their reference implementation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
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
from tests.support.likelihood import log_likelihoods
from tests.support.transformers_models import gguf_llama_model

DATA = Path(__file__).parents[1] / "data"
WINDOW = 1024  # tokens of a text that is measured at once
# Rows whose logits are held at a time: buffers small enough for malloc to reuse.
CHUNK = 128


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

    def close(self) -> None:
        """Ends the tokenizer's process and lets go of the file."""
        self.tokenizer.close()
        self.checkpoint.close()


class TransformersModel:
    """transformers in fp32: what every number here is compared with."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    def logits_in_chunks(
        self, token_ids_T: npt.NDArray[np.int32], *, chunk: int
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Logits [chunk, V] of one text, from its first token to its last."""
        import torch

        with torch.inference_mode():
            hidden_BTH = self._model.model(torch.from_numpy(token_ids_T)[None]).last_hidden_state
            for hidden_CH in hidden_BTH[0].split(chunk):
                yield self._model.lm_head(hidden_CH).numpy()


@pytest.fixture(scope="session")
def smollm2() -> Iterator[RealModel]:
    model = RealModel(resolve_model("smollm2-135m-instruct"))
    yield model
    model.close()


@pytest.fixture(scope="session")
def stories15m() -> Iterator[RealModel]:
    model = RealModel(resolve_model("stories15m"))
    yield model
    model.close()


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: RealModel) -> TransformersModel:
    """SmolLM2 by transformers, from the same file but by another reader."""
    return TransformersModel(gguf_llama_model(smollm2.path))


@pytest.fixture(scope="session")
def first_window_TV(
    smollm2_reference: TransformersModel, wikitext_ids: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """The reference's logits of the first 1,024 tokens."""
    return np.concatenate([*smollm2_reference.logits_in_chunks(wikitext_ids[:WINDOW], chunk=256)])


@pytest.fixture(scope="session")
def wikitext_ids(smollm2: RealModel) -> npt.NDArray[np.int32]:
    return encode_wikitext(smollm2)


def encode_wikitext(model: RealModel) -> npt.NDArray[np.int32]:
    """WikiText-2's test text as the model's ids, without BOS."""
    text = (DATA / "wikitext2_test.txt").read_text(encoding="utf-8")
    return np.array(model.tokenizer.encode(text[:400_000], add_bos=False), np.int32)


def log_likelihood(model: Chain | TransformersModel, token_ids_T: npt.NDArray[np.int32]) -> float:
    """The sum over a window's tokens but the first, in nats."""
    chunks = model.logits_in_chunks(token_ids_T, chunk=CHUNK)
    return float(log_likelihoods(chunks, token_ids_T).sum())
