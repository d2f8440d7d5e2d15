"""Where the machine code of kernels is kept: once for all installations of the same sources.

numba notices neither a change in a function that a cached kernel calls nor one in an intrinsic. So
the folder is named by `kernel_cache_key`, unless the user chose one for numba (NUMBA_CACHE_DIR),
whose upkeep is then theirs. In it numba names a folder for the absolute path of a function's
source; here that is the source's place in this project. Besides, of two processes that save other
signatures of a function at the same moment, numba may give both the same file: one saves at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    InTreeCacheLocator,
    UserProvidedCacheLocator,
    UserWideCacheLocator,
)

from core.cache_folder import cache_folder
from core.kernels.fingerprint import kernel_cache_key

_ROOT = Path(__file__).parents[2]
LOCK = "lock"


class _Locator(UserProvidedCacheLocator):
    """Below the folder that is chosen for numba."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        return ".".join(Path(py_file).absolute().relative_to(_ROOT).parent.parts)

    def get_source_stamp(self) -> str:
        """Of what the file says, not of when it was written."""
        return hashlib.sha256(Path(self._py_file).read_bytes()).hexdigest()


class _Results(CompileResultCacheImpl):
    # The others where the folder cannot be written, or none was chosen.
    _locator_classes = [_Locator, InTreeCacheLocator, UserWideCacheLocator]  # noqa: RUF012 (numba's)


class KernelCache(FunctionCache):
    """The machine code of one kernel of this project."""

    _impl_class = _Results

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps what was compiled for a signature."""
        self._impl.locator.ensure_cache_path()
        with (Path(self.cache_path) / LOCK).open("wb") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def _choose_folder() -> None:
    options: Any = numba.config
    if not options.CACHE_DIR:
        try:
            folder = cache_folder() / "kernels" / f"numba-{kernel_cache_key()}"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            return  # nothing can be written, or there is no home: numba looks for a place itself
        options.CACHE_DIR = str(folder)


_choose_folder()
