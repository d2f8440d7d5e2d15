"""transformers on the same card: `generate` at the same batch, and its continuous batching.

Its weights are random: they do not matter for speed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.benchmarks.gpu.ours import Load
from tests.support.models import TinyModel, hugging_face_config


@dataclass(frozen=True, kw_only=True)
class TheirRates:
    """Tokens a second, prefill included in neither: two lengths are measured and subtracted."""

    generate: float
    continuous: float


class TransformersModel:
    """A model in bfloat16 on the card."""

    def __init__(self, model: TinyModel) -> None:
        settings = hugging_face_config(model)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("cuda"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self._vocab_size = model.vocab_size

    def rates(self, load: Load) -> TheirRates:
        """Decodes the load both ways."""
        return TheirRates(
            generate=self._rate(self._generate, load), continuous=self._rate(self._batch, load)
        )

    def _rate(self, run: Any, load: Load) -> float:
        prompts = torch.randint(3, self._vocab_size, (load.num_sequences, load.prompt_tokens))
        run(prompts, 4)
        short_s, long_s = (_seconds(run, prompts, count) for count in (4, 4 + load.num_steps))
        return load.num_sequences * load.num_steps / (long_s - short_s)

    def _generate(self, prompts: torch.Tensor, num_tokens: int) -> None:
        with torch.inference_mode():
            self._model.generate(
                prompts.cuda(),
                attention_mask=torch.ones_like(prompts).cuda(),
                generation_config=_greedy(num_tokens),
            )

    def _batch(self, prompts: torch.Tensor, num_tokens: int) -> None:
        with torch.inference_mode():
            self._model.generate_batch(prompts.tolist(), generation_config=_greedy(num_tokens))


def _greedy(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0
    )


def _seconds(run: Any, prompts: torch.Tensor, num_tokens: int) -> float:
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    run(prompts, num_tokens)
    torch.cuda.synchronize()
    return time.perf_counter() - started_s
