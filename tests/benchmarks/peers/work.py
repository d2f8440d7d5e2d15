"""What everybody is asked to do: the same prompts, the same lengths, in the same order.

Prompts are pieces of real text, as token ids, none twice in a run: what a model makes of random
ids repeats itself more than text does, and a prefix seen before could be taken from a cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.tokens.tokenizer import load_tokenizer

TEXT = Path(__file__).parents[2] / "data" / "wikitext2_test.txt"
TEXT_CHARACTERS = 800_000
SEED = 20231116
# A short measurement says little: few streams send several waves of requests.
MIN_REQUESTS = {1: 4, 8: 16}
PREFILL_PROMPTS = 16
PREFILL_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Work:
    """Waves of `streams` requests at once; the next wave starts when the one before has ended."""

    name: str
    streams: int
    num_waves: int
    num_prompt_tokens: int
    num_new_tokens: int

    @property
    def num_requests(self) -> int:
        return self.streams * self.num_waves

    @property
    def counted_tokens(self) -> int:
        """Tokens that its rate counts: the new ones, or the prompts' where nothing follows."""
        each = self.num_prompt_tokens if self.num_new_tokens == 1 else self.num_new_tokens
        return self.num_requests * each


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Prompts that are sent at once, and how many new tokens each gets."""

    prompts: Sequence[Sequence[int]]
    num_new_tokens: int


def decode(streams: int) -> Work:
    """Short prompts, 128 new tokens each."""
    return Work(
        name=f"decode {streams}",
        streams=streams,
        num_waves=max(1, MIN_REQUESTS.get(streams, streams) // streams),
        num_prompt_tokens=16,
        num_new_tokens=128,
    )


def prefill() -> Work:
    """Long prompts at once, one new token each."""
    return Work(
        name="prefill",
        streams=PREFILL_PROMPTS,
        num_waves=1,
        num_prompt_tokens=PREFILL_TOKENS,
        num_new_tokens=1,
    )


def warm_up(work: Work) -> Work:
    """The same load, shorter, on prompts of its own."""
    name, new = f"warm-up of {work.name}", min(work.num_new_tokens, 4)
    return Work(
        name=name,
        streams=work.streams,
        num_waves=1,
        num_prompt_tokens=work.num_prompt_tokens,
        num_new_tokens=new,
    )


class Prompts:
    """Pieces of `token_ids`; those of one (work, round) are the same for whoever asks."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids

    def waves(self, work: Work, *, turn: int) -> Iterator[Wave]:
        """The waves of one piece of work in one round."""
        length = work.num_prompt_tokens
        rng = random.Random(f"{SEED} {work.name} {turn}")
        starts = rng.sample(range(len(self._token_ids) - length), work.num_requests)
        for wave in range(work.num_waves):
            chosen = starts[wave * work.streams : (wave + 1) * work.streams]
            yield Wave(
                prompts=[self._token_ids[start : start + length] for start in chosen],
                num_new_tokens=work.num_new_tokens,
            )


def read_prompts(model: Path) -> Prompts:
    """Prompts from the test text, in the tokens of `model`."""
    tokenizer = load_tokenizer(model)
    try:
        text = TEXT.read_text()[:TEXT_CHARACTERS]
        return Prompts(tokenizer.encode(text, add_bos=False))
    finally:
        tokenizer.close()


def estimate_s(
    works: Sequence[Work], *, rate: Callable[[Work], float], start_s: float, rounds: int
) -> float:
    """How long a system's turns may take, from a guess of its rates."""
    busy_s = sum(work.counted_tokens / rate(work) for work in works)
    return rounds * (start_s + 1.1 * busy_s)
