"""Guesses the next tokens of a sequence, where verifying the guesses costs less than it saves.

A guess is what followed when the last tokens occurred before, in prompt or output ("prompt
lookup": Saxena 2023; Yang et al., "Inference with Reference", 2023). Guessed tokens are computed
as further rows of the sequence's run and count as long as each equals what was sampled before
it, so that the output is the same to the bit, sampled or greedy.

How often text goes on as it did before is learned by length of match, from every token,
guessed or not. A row is added while it promises more tokens a second than the micro-batch
yields without it: where rows are dear because the pipeline is full, none is.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

from core.errors import InvalidInput
from core.pipeline.sequences import Sequence
from core.pipeline.token_index import LONGEST_MATCH, TokenIndex

# Observations after which what was learned before counts half: about 70.
_LEARNING_RATE = 0.01
# Shares of agreement by length of match, from 1 on, as seen in chat and code answered by a
# small model; they are soon learned anew.
_FIRST_SHARES = (0.15, 0.4, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
# No match is believed to be surer than this.
_SUREST = 0.99


@dataclass(frozen=True, kw_only=True)
class SpeculationSettings:
    """Bounds of speculation."""

    max_draft_tokens: int = 16  # guesses of one sequence in a micro-batch; 0: none ever
    # A row must promise to yield this many times what it costs: both are estimates.
    margin: float = 1.3

    def __post_init__(self) -> None:
        if self.max_draft_tokens < 0:
            raise InvalidInput("max_draft_tokens", self.max_draft_tokens, "0 or more")
        if not self.margin >= 1.0:
            raise InvalidInput("margin", self.margin, "at least 1")


@dataclass(slots=True, kw_only=True)
class Stakes:
    """What one more row of a micro-batch delays: `tokens` every `seconds`, by `row_s`."""

    tokens: float
    seconds: float
    row_s: float

    @property
    def least_probability(self) -> float:
        """A guess surer than this raises tokens per second."""
        return self.tokens * self.row_s / self.seconds

    def add_row(self, probability: float) -> None:
        self.tokens += probability
        self.seconds += self.row_s


class Agreement:
    """The share of matches of each length after which the text went on as before."""

    def __init__(self) -> None:
        later = (_FIRST_SHARES[-1],) * (LONGEST_MATCH - len(_FIRST_SHARES))
        self.shares = [0.0, *_FIRST_SHARES, *later]

    def note(self, length: int, agreed: bool) -> None:
        self.shares[length] += _LEARNING_RATE * (agreed - self.shares[length])


class Speculation:
    """Drafts for the sequences of a pipeline, and the count of what became of them."""

    def __init__(self, settings: SpeculationSettings) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._settings = settings
        self._greedy, self._drawn = Agreement(), Agreement()

    def pays(self, stakes: Stakes) -> bool:
        """Whether the surest guess would be worth its row."""
        return self._settings.max_draft_tokens > 0 and self._least(stakes) < _SUREST

    def draft(self, sequence: Sequence, stakes: Stakes, *, most: int) -> list[int]:
        """Guesses what follows the sequence's tokens, `most` tokens at most; adds their rows
        to the stakes."""
        # With the last token that it may generate a sequence ends: nothing follows to verify.
        remaining = sequence.sampling.max_tokens - sequence.num_generated - 1
        most = min(most, remaining, self._settings.max_draft_tokens)
        if most <= 0 or sequence.sampling.has_penalties:
            return []
        index = sequence.index
        if index is None:
            index = sequence.index = TokenIndex(
                sequence.token_ids, num_prompt_tokens=sequence.num_prompt_tokens
            )
        agreement = self._greedy if sequence.sampling.is_greedy else self._drawn
        index.catch_up(agreement)
        draft: list[int] = []
        probability, length = 1.0, index.match_length
        while length and len(draft) < most:
            probability *= min(agreement.shares[length], _SUREST)
            if probability < self._least(stakes):
                break
            draft.append(index.guess(len(draft), draft))
            stakes.add_row(probability)
            length = min(length + 1, LONGEST_MATCH)
        self.num_drafted += len(draft)
        return draft

    def _least(self, stakes: Stakes) -> float:
        return self._settings.margin * stakes.least_probability


def count_accepted(draft: list[int], sampled: List[int]) -> int:
    """How many guesses were right up to the first wrong one; `sampled` has one token more."""
    for count, guess in enumerate(draft):
        if guess != sampled[count]:
            return count
    return len(draft)
