"""Whether members of a team are there while they compute together.

On a busy machine a member waits for a core, and all others for that member, several times in every
layer: then fewer are faster.
"""

from __future__ import annotations

# Of the time that a micro-batch takes, the share that every member must have a core, on average.
# Two members are 1.5 to 1.7 times as fast as one, where both have: below that they are no gain.
LEAST_PRESENT = 0.65
# Micro-batches that half of a team computes before all of it is tried again: so many at first, and
# twice as many after each try that fails, since a failing one takes some 20 to be found out.
FIRST_PAUSE, LONGEST_PAUSE = 256, 4096
_WEIGHT = 1 / 32  # of the latest micro-batch


class Attendance:
    """Learns from each micro-batch of a team, and has half of it pause where it does not pay."""

    def __init__(self) -> None:
        self._present = 1.0
        self._num_noted = 0  # micro-batches of teams of the present size
        self._most = 1  # members, while others pause
        self._num_left = 0  # micro-batches until all are tried again
        self._pause = FIRST_PAUSE

    def choose(self, most: int) -> int:
        """How many members, of `most`, are to compute the next micro-batch; asked before each."""
        if self._num_left == 0:
            return most
        self._num_left -= 1
        if self._num_left == 0:
            self._present, self._num_noted = 1.0, 0
        return min(self._most, most)

    def note(self, num_members: int, *, wall_ns: int, least_cpu_ns: int) -> None:
        """A team's micro-batch took so long; so long at least did each member have a core."""
        present = min(least_cpu_ns / max(wall_ns, 1), 1.0)
        self._present += _WEIGHT * (present - self._present)
        self._num_noted += 1
        if self._present < LEAST_PRESENT:
            self._present, self._num_noted = 1.0, 0
            self._most, self._num_left = num_members // 2, self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif self._num_left == 0 and self._num_noted >= FIRST_PAUSE:
            self._pause = FIRST_PAUSE
