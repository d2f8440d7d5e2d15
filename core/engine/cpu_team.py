"""The threads that compute micro-batches together with the one that asks for them.

They run compiled code without the GIL and sleep between micro-batches, each in a read of its own
pipe. The leader calls them with a byte: nothing of Python stands between that and their work.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from core.engine.attendance import Attendance
from core.kernels.memory import aligned_zeros
from core.kernels.team import BARRIER_WORDS
from core.models.llama.model import StageMember

# What a member calls with itself: the leader for each micro-batch, a helper once.
Compute = Callable[[StageMember], None]
# The clock of a thread's time on a core, by the thread's identity.
ClockOf = Callable[[int], int]

_CLOCK_OF: ClockOf | None = getattr(time, "pthread_getcpuclockid", None)  # macOS has none
# For all helpers together: one that hangs never comes.
_END_LIMIT_S = 1.0


class CpuTeam:
    """A leader, which is whoever calls `run`, and helpers.

    Helpers end when the team is no longer used. One that does not come to meet the others holds the
    leader up for ever, as a computation that hangs does. The leader waits without the GIL: other
    threads of the process find it hanging, and can end the process.
    """

    def __init__(
        self, computes: Sequence[Compute], *, clock_of: ClockOf | None = _CLOCK_OF
    ) -> None:
        """One for each member, the leader's first; none may hold the team.

        `clock_of`: None where a thread's time on a core is known to that thread alone. Helpers
        count as present there.
        """
        barrier = aligned_zeros((BARRIER_WORDS,), np.int64)
        self._compute = computes[0]
        self._leader = _member(0, call=-1, barrier=barrier)
        self._helpers = [
            _Helper(compute, number=number, barrier=barrier, clock_of=clock_of)
            for number, compute in enumerate(computes[1:], start=1)
        ]
        self._attendance = Attendance()
        weakref.finalize(self, _end, self._helpers)

    def choose(self, most: int) -> int:
        """How many members, up to `most`, are to compute the next micro-batch."""
        return self._attendance.choose(most) if most > 1 else 1

    def run(self, num_members: int) -> None:
        """Has so many members, the leader among them, compute; returns when all have."""
        if num_members == 1:
            self._compute(self._leader)
            return
        helpers = self._helpers[: num_members - 1]
        began_ns = time.perf_counter_ns()
        before_ns = [time.thread_time_ns(), *(helper.cpu_ns() for helper in helpers)]
        for helper in helpers:
            helper.call()
        self._compute(self._leader)
        after_ns = [time.thread_time_ns(), *(helper.cpu_ns() for helper in helpers)]
        self._attendance.note(
            num_members,
            wall_ns=time.perf_counter_ns() - began_ns,
            least_cpu_ns=min(b - a for a, b in zip(before_ns, after_ns, strict=True)),
        )


class _Helper:
    """A thread that computes when it is called."""

    def __init__(
        self,
        compute: Compute,
        *,
        number: int,
        barrier: npt.NDArray[np.int64],
        clock_of: ClockOf | None,
    ) -> None:
        read, self._write = os.pipe()
        member = _member(number, call=read, barrier=barrier)

        def run() -> None:
            try:
                compute(member)
            finally:
                os.close(read)

        # A daemon: one that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=run, name=f"compute-{number}", daemon=True)
        self._thread.start()
        # A thread that has begun has an identity.
        identity = cast(int, self._thread.ident)
        self._clock = time.CLOCK_MONOTONIC if clock_of is None else clock_of(identity)

    def call(self) -> None:
        """Has it compute the micro-batch that is noted."""
        os.write(self._write, b"\0")

    def cpu_ns(self) -> int:
        """For how long it has had a core; where nobody knows, as if it always had."""
        return time.clock_gettime_ns(self._clock)

    def dismiss(self) -> None:
        """Ends it, once it sleeps."""
        os.close(self._write)

    def join(self, *, timeout_s: float) -> None:
        self._thread.join(timeout_s)


def _member(number: int, *, call: int, barrier: npt.NDArray[np.int64]) -> StageMember:
    return StageMember(number=number, call=call, barrier=barrier, room=np.zeros(1, np.uint8))


def _end(helpers: list[_Helper]) -> None:
    for helper in helpers:
        helper.dismiss()
    limit_s = time.monotonic() + _END_LIMIT_S
    for helper in helpers:
        helper.join(timeout_s=max(0.0, limit_s - time.monotonic()))
