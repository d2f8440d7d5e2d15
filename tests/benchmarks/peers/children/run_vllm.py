"""vLLM's offline API, driven through the pipe of protocol.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from protocol import Generate, answer_tasks


def load(options: dict[str, Any]) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        skip_tokenizer_init=True,
        # Prompts never repeat here, so looking for known prefixes would only cost time.
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )

    def generate(prompts: list[list[int]], num_new_tokens: int) -> int:
        sampling = SamplingParams(
            temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = llm.generate(inputs, sampling, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return generate


if __name__ == "__main__":
    answer_tasks(load)
