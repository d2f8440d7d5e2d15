"""Whether members of a team are there while they compute together.

On a busy machine a member waits for a core, and all others for that member, several times in every
layer: then one thread alone is faster than two.
"""

from __future__ import annotations

# Of the time that a micro-batch takes, the share that every member must have a core, on average.
# Two members are 1.5 to 1.7 times as fast as one, where both have: below that they are no gain.
LEAST_PRESENT = 0.65
# Micro-batches that one thread computes alone before the team is tried again.
ALONE = 256
_WEIGHT = 1 / 32  # of the latest micro-batch


class Attendance:
    """Learns from each micro-batch of the team, and has it pause where it does not pay."""

    def __init__(self) -> None:
        self._present = 1.0
        self._num_alone = 0  # micro-batches until the team is tried again

    def allows_team(self) -> bool:
        """Asked before each micro-batch that a team could compute."""
        if self._num_alone == 0:
            return True
        self._num_alone -= 1
        return False

    def note(self, *, wall_ns: int, least_cpu_ns: int) -> None:
        """A team's micro-batch took so long; so long at least did each member have a core."""
        present = min(least_cpu_ns / max(wall_ns, 1), 1.0)
        self._present += _WEIGHT * (present - self._present)
        if self._present < LEAST_PRESENT:
            self._present, self._num_alone = 1.0, ALONE
