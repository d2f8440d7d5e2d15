"""How every CPU kernel is compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba.extending
from numba import njit

from core.kernels.cache import KernelCache

# Functions of LLVM instructions. numba's annotations forget that it passes the first argument.
intrinsic: Any = numba.extending.intrinsic


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a kernel at its first call: no GIL, C division, IEEE order of sums, disk cache.

    No fast-math: sums keep their written order, so that a row's result never depends on
    how loops are cut.
    """
    return _kept(function)


def inlined(function: Callable[..., Any]) -> Any:
    """As `kernel`, and LLVM puts it where it is called, so that loops around it vectorise."""
    return _kept(function, forceinline=True)


def _kept(function: Callable[..., Any], *, forceinline: bool = False) -> Any:
    compiled: Any = njit(nogil=True, error_model="numpy", forceinline=forceinline)(function)
    with suppress(RuntimeError):  # nothing can be written anywhere: every process compiles it
        # As numba's `enable_caching` does.
        compiled._cache = KernelCache(function)  # type: ignore[no-untyped-call]
    return compiled
