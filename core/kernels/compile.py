"""How every CPU kernel is compiled, and where the machine code is kept.

numba notices neither a change in a function that a cached kernel calls nor one in an
intrinsic. So the cache lies in a folder that is named by `kernel_cache_key`, unless
the user chose one for numba (NUMBA_CACHE_DIR), whose upkeep is then theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
import numba.extending
from numba import njit

from core.cache_folder import cache_folder
from core.kernels.cache import KernelCache
from core.kernels.fingerprint import kernel_cache_key

# Functions of LLVM instructions. numba's annotations forget that it passes the first argument.
intrinsic: Any = numba.extending.intrinsic


def _choose_cache_folder() -> None:
    options: Any = numba.config
    if not options.CACHE_DIR:
        try:
            folder = cache_folder() / "kernels" / f"numba-{kernel_cache_key()}"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            return  # nothing can be written, or there is no home: numba looks for a place itself
        options.CACHE_DIR = str(folder)


_choose_cache_folder()


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
