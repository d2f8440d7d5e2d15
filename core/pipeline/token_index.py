"""Where the last tokens of a text occurred in it before, and what followed them there."""

from __future__ import annotations

from typing import Protocol

# Longer matches say nothing more.
LONGEST_MATCH = 16


class Witness(Protocol):
    """Hears whether what followed an earlier occurrence followed again."""

    def note(self, length: int, agreed: bool) -> None: ...


class TokenIndex:
    """Finds the latest earlier occurrence of a growing text's end, in O(1) per token.

    A match is followed as long as the text goes on as it did; then the last pair of tokens is
    looked up, or the last token alone.
    """

    def __init__(self, token_ids: list[int], *, num_prompt_tokens: int) -> None:
        """`token_ids` stays the caller's, who appends to it and changes nothing else."""
        self._token_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._num_indexed = 0
        # Position after the latest occurrence, by pair of tokens and by token (its complement).
        self._places: dict[int, int] = {}
        self._next = -1  # position of the token that followed the match
        self.match_length = 0  # 0: nothing matches; at most LONGEST_MATCH

    def catch_up(self, witness: Witness) -> None:
        """Takes in what was appended; the witness hears of each token after the prompt."""
        token_ids, places = self._token_ids, self._places
        for position in range(self._num_indexed, len(token_ids)):
            token_id = token_ids[position]
            previous = token_ids[position - 1] if position else -1
            pair = previous << 32 | token_id
            agreed = self._next >= 0 and token_ids[self._next] == token_id
            if self._next >= 0 and position >= self._num_prompt_tokens:
                witness.note(self.match_length, agreed)
            if agreed:
                self._next += 1
                self.match_length = min(self.match_length + 1, LONGEST_MATCH)
            else:
                self._look_up(position, pair)
            places[pair] = places[~token_id] = position + 1
        self._num_indexed = len(token_ids)

    def _look_up(self, position: int, pair: int) -> None:
        token_ids, places = self._token_ids, self._places
        end = places.get(pair, -1)
        if end < 0:
            self._next = places.get(~token_ids[position], -1)
            self.match_length = int(self._next >= 0)
            return
        length, longest = 2, min(LONGEST_MATCH, end)
        while length < longest and token_ids[end - length - 1] == token_ids[position - length]:
            length += 1
        self._next, self.match_length = end, length

    def guess(self, ahead: int, draft: list[int]) -> int:
        """The token that followed the match, `ahead` tokens on; `draft` has those before it.

        A match that reaches the text's end goes on into the draft: the text repeats itself.
        """
        position, num_tokens = self._next + ahead, len(self._token_ids)
        if position < num_tokens:
            return self._token_ids[position]
        return draft[position - num_tokens]
