"""Pauses between attempts to reach a part of the mesh."""

from __future__ import annotations

_FIRST_S = 0.05
# A part that comes back is found within a second.
_MOST_S = 1.0


class Backoff:
    """Pauses that double with each attempt that fails."""

    def __init__(self) -> None:
        self._next_s = _FIRST_S

    def reset(self) -> None:
        """An attempt has succeeded."""
        self._next_s = _FIRST_S

    def take_s(self) -> float:
        """The pause before the next attempt."""
        pause_s = self._next_s
        self._next_s = min(2 * pause_s, _MOST_S)
        return pause_s
