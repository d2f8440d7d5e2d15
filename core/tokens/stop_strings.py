"""Finds stop strings in a growing text, across the borders of its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """Text that may be shown, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStrings:
    """Passes text on up to the stop string that is complete first.

    The result does not depend on how the text is cut into pieces: where several
    stop strings match, the one that ends first wins, and of those the longest.
    Only text that may still become a stop string is held back.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings; there may be none."""
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Takes the next piece. After `stopped` the matcher must not be used again."""
        if not self._stops:
            return StopResult(text, False)
        text = self._held + text
        first = self._first_stop(text)
        if first is not None:
            self._held = ""
            return StopResult(text[:first], True)
        held_from = self._start_of_possible_stop(text)
        self._held = text[held_from:]
        return StopResult(text[:held_from], False)

    def flush(self) -> str:
        """Ends the text: returns what was held back."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _start_of_possible_stop(self, text: str) -> int:
        """Index of the longest end of `text` that begins a stop string; len(text) if none does."""
        earliest = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), earliest)
            while start >= 0:
                if stop.startswith(text[start:]):
                    earliest = start
                    break
                start = text.find(stop[0], start + 1, earliest)
        return earliest
