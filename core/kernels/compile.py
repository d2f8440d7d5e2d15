"""How every CPU kernel is compiled, and where the machine code is kept.

numba notices neither a change in a function that a cached kernel calls nor one in an
intrinsic. So the cache lies in a folder that is named by `kernel_cache_key`, unless
the user chose one for numba (NUMBA_CACHE_DIR), whose upkeep is then theirs. Every
installation with the same sources finds the same kernels there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.extending
from numba import njit
from numba.core.caching import UserProvidedCacheLocator

from core.cache_folder import cache_folder
from core.kernels.fingerprint import kernel_cache_key

_ROOT = Path(__file__).parents[2]
# Tried after ours, where its folder cannot be written.
_LOCATORS_OF_NUMBA = ("InTreeCacheLocator", "UserWideCacheLocator")

# Functions of LLVM instructions. numba's annotations forget that it passes the first argument.
intrinsic: Any = numba.extending.intrinsic


class KernelLocator(UserProvidedCacheLocator):
    """numba's own, but that a source's folder is named for where it lies in this project."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        """Below the cache's folder."""
        source = Path(py_file).absolute()
        if source.is_relative_to(_ROOT):
            return ".".join(source.relative_to(_ROOT).parent.parts)
        return str(super().get_suitable_cache_subpath(py_file))  # type: ignore[no-untyped-call]


def _choose_cache_folder() -> None:
    options: Any = numba.config
    if not options.CACHE_DIR:
        try:
            folder = cache_folder() / "kernels" / f"numba-{kernel_cache_key()}"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            return  # nothing can be written, or there is no home: numba looks for a place itself
        options.CACHE_DIR = str(folder)
    if not options.CACHE_LOCATOR_CLASSES:
        names = (f"{__name__}.{KernelLocator.__name__}", *_LOCATORS_OF_NUMBA)
        options.CACHE_LOCATOR_CLASSES = ",".join(names)


_choose_cache_folder()


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a kernel at its first call: no GIL, C division, IEEE order of sums, disk cache.

    No fast-math: sums keep their written order, so that a row's result never depends on
    how loops are cut.
    """
    return njit(nogil=True, error_model="numpy", cache=True)(function)
