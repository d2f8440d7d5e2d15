"""How CUDA kernels are launched."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """The stream that kernels go to, and how many threads a block may have.

    numba's simulator starts a Python thread for every CUDA thread: it needs small blocks.
    """

    stream: Any = 0
    most_threads: int = 1024

    def threads(self, wanted: int) -> int:
        """As many threads as wanted, or as are allowed; both are powers of two."""
        return min(wanted, self.most_threads)

    def threads_xy(self, wanted: tuple[int, int]) -> tuple[int, int]:
        """Likewise along two axes; the longer one shrinks first."""
        x, y = wanted
        while x * y > self.most_threads:
            x, y = (x // 2, y) if x >= y else (x, y // 2)
        return x, y


def ceil_div(count: int, size: int) -> int:
    """How many turns of `size` it takes to see to `count`."""
    return -(-count // size)
