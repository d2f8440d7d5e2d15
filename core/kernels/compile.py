"""How every CPU kernel is compiled, and where the machine code is kept.

numba notices neither a change in a function that a cached kernel calls nor one in an
intrinsic. So the cache lies in a folder that is named by `kernel_cache_key`, unless
the user chose one for numba (NUMBA_CACHE_DIR), whose upkeep is then theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.extending
from numba import njit

from core.kernels.fingerprint import kernel_cache_key

CACHE_FOLDER = Path(__file__).parent / "__pycache__" / f"numba-{kernel_cache_key()}"

# Functions of LLVM instructions. numba's annotations forget that it passes the first argument.
intrinsic: Any = numba.extending.intrinsic


def _choose_cache_folder() -> None:
    options: Any = numba.config
    if options.CACHE_DIR:
        return
    try:
        CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only installation: numba falls back to the user's own cache folder
    options.CACHE_DIR = str(CACHE_FOLDER)


_choose_cache_folder()


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a kernel at its first call: no GIL, C division, IEEE order of sums, disk cache.

    No fast-math: sums keep their written order, so that a row's result never depends on
    how loops are cut.
    """
    return njit(nogil=True, error_model="numpy", cache=True)(function)
