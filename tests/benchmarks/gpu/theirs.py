"""transformers on the same card: `generate` at the same batch, and its continuous batching.

Its weights are random: they do not matter for speed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.benchmarks.gpu.ours import Load
from tests.support.models import TinyModel, hugging_face_config


@dataclass(frozen=True, kw_only=True)
class TheirRates:
    """Tokens a second, prefill included in neither."""

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
        prompts = torch.randint(3, self._vocab_size, (load.num_sequences, load.prompt_tokens))
        return TheirRates(
            generate=self._generate_rate(prompts, load.num_steps),
            continuous=self._continuous_rate(prompts, load.num_steps),
        )

    def _generate_rate(self, prompts: torch.Tensor, num_steps: int) -> float:
        """Of what a longer run takes more than a shorter one."""
        self._generate(prompts, 4)
        short_s, long_s = (self._generate_s(prompts, count) for count in (4, 4 + num_steps))
        return len(prompts) * num_steps / (long_s - short_s)

    def _continuous_rate(self, prompts: torch.Tensor, num_steps: int) -> float:
        """Of the time in which all sequences decode, by their own time stamps."""
        # Not in inference mode: a thread of theirs writes to what is made here.
        answers = self._model.generate_batch(
            prompts.tolist(),
            generation_config=_greedy(num_steps + 1),
            record_timestamps=True,
        )
        times_s = [answer.timestamps for answer in answers.values()]
        lengths = [len(times) for times in times_s]
        if lengths != [num_steps + 1] * len(prompts):
            raise RuntimeError(f"{num_steps + 1} tokens each were due, not {lengths}")
        all_run_s, one_ends_s = max(t[0] for t in times_s), min(t[-1] for t in times_s)
        num_tokens = sum(all_run_s < t <= one_ends_s for times in times_s for t in times)
        return num_tokens / (one_ends_s - all_run_s)

    def _generate(self, prompts: torch.Tensor, num_tokens: int) -> None:
        with torch.inference_mode():
            self._model.generate(
                prompts.cuda(),
                attention_mask=torch.ones_like(prompts).cuda(),
                generation_config=_greedy(num_tokens),
            )

    def _generate_s(self, prompts: torch.Tensor, num_tokens: int) -> float:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        self._generate(prompts, num_tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - started_s


def _greedy(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0
    )
