"""Hashes the weights in memory again and again, to notice when a bit of them has changed.

The arrays that are computed with are hashed once they are packed. XXH3 has the memory's own speed:
this is about memory that fails, not about somebody who writes to it, since he could write the
digests as well.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy.typing as npt
import xxhash

# Hashed in a fraction of a millisecond, for which the compute thread may have to wait.
PIECE_BYTES = 4 << 20
# Between two pieces it rests so many times as long as a piece took: 0.5 % of a core at most, and
# big models take longer than the interval.
_REST = 200
_LEAST_PRIORITY = 19


class _Piece(NamedTuple):
    name: str
    content: memoryview
    digest: bytes


class WeightWatch:
    """Digests of arrays, and a thread that compares them."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], *, interval_s: float = 0.0) -> None:
        """Reads all arrays once. Each piece is hashed once in `interval_s`; 0: never."""
        self._interval_s = interval_s
        self._pieces = tuple(_cut(arrays)) if interval_s else ()
        self._stop = threading.Event()
        self.num_bytes_checked = 0
        self.damaged = ""  # the array that has changed

    def start(self, on_damage: Callable[[str], None]) -> None:
        """Starts the thread. It calls `on_damage` with the name of the first array that it finds
        changed, and ends. A daemon: a process that is told to stop need not wait for it."""
        if self._pieces:
            thread = threading.Thread(
                target=self._run, args=(on_damage,), name="weight-watch", daemon=True
            )
            thread.start()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> Iterator[str]:
        """Hashes piece after piece, for ever; says each time whose piece has changed, or ""."""
        while True:
            for piece in self._pieces:
                changed = xxhash.xxh3_128_digest(piece.content) != piece.digest
                self.num_bytes_checked += piece.content.nbytes
                yield piece.name if changed else ""

    def _run(self, on_damage: Callable[[str], None]) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        results = self.check()
        pause_s = self._interval_s / len(self._pieces)
        while not self._stop.wait(pause_s):
            started_s = time.thread_time()
            self.damaged = next(results)
            if self.damaged:
                on_damage(self.damaged)
                return
            spent_s = time.thread_time() - started_s
            pause_s = max(self._interval_s / len(self._pieces), _REST * spent_s)


def _cut(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[_Piece]:
    for name, array in arrays.items():
        if array.nbytes == 0:
            continue
        content = array.data.cast("B")
        for first in range(0, len(content), PIECE_BYTES):
            piece = content[first : first + PIECE_BYTES]
            yield _Piece(name, piece, xxhash.xxh3_128_digest(piece))
