"""Token ids to text, piece by piece, at constant cost a token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns a growing sequence of ids into text deltas whose concatenation is the whole text.

    A character whose bytes are spread over several tokens is held back until it is
    complete; bytes that can no longer become one are U+FFFD (as the WHATWG decoder and
    Unicode 15, section 3.9, "substitution of maximal subparts", have it).
    """

    __slots__ = ("_bytes_of", "_decoder", "_strips_next_space")

    def __init__(self, bytes_of: Sequence[bytes], *, strips_leading_space: bool) -> None:
        """`bytes_of[id]` is what a token adds; ids beyond it (an embedding's padding) add none."""
        self._bytes_of = bytes_of
        self._decoder = _new_decoder("replace")
        self._strips_next_space = strips_leading_space

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next ids and returns the text that they complete; often empty."""
        bytes_of = self._bytes_of
        try:
            data = b"".join([bytes_of[token_id] for token_id in token_ids])
        except IndexError:
            known = len(bytes_of)
            data = b"".join([bytes_of[i] for i in token_ids if i < known])
        return self._text(self._decoder.decode(data))

    def flush(self) -> str:
        """Ends the sequence: returns U+FFFD for an incomplete character, else nothing."""
        return self._text(self._decoder.decode(b"", final=True))

    def _text(self, text: str) -> str:
        if self._strips_next_space and text:
            self._strips_next_space = False
            return text.removeprefix(" ")
        return text
