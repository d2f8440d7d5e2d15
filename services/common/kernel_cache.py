"""Where compiled kernels are kept between runs, and for how long."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from core.kernels.fingerprint import kernel_cache_key

# Folders of other keys that are kept: going back to an older version costs no compilation.
NUM_KEPT = 3
# A folder that was used so lately may be in use by a process that still compiles.
SPARED_S = 3600.0


def kernels_are_compiled(number_format: str) -> bool:
    """Whether an engine of this number format has been made with these kernels on this machine.

    To be called once the kernels are imported, as is `note_compiled`.
    """
    marker = _marker(number_format)
    return marker is not None and marker.exists()


def note_compiled(number_format: str) -> None:
    """Notes that an engine has been made, and prunes what older kernels have left.

    Folders that a person chose for numba (NUMBA_CACHE_DIR) are theirs to prune.
    """
    marker = _marker(number_format)
    if marker is None:
        return
    with suppress(OSError):  # a read-only installation, or a folder that is gone
        marker.touch()
        folder = marker.parent
        os.utime(folder)
        if folder.name.endswith(kernel_cache_key()):
            prune(folder)


def prune(used: Path) -> None:
    """Removes the folders beside `used` that are named like it, but for the NUM_KEPT that were
    used last and those used within SPARED_S. Any number of processes may do so at once."""
    pattern = used.name.removesuffix(kernel_cache_key()) + "[0-9a-f]" * len(kernel_cache_key())
    others = []
    for folder in used.parent.glob(pattern):
        with suppress(OSError):  # another process has pruned it
            if folder != used:
                others.append((folder.stat().st_mtime, folder))
    others.sort(reverse=True)
    for used_at, folder in others[NUM_KEPT:]:
        if time.time() - used_at > SPARED_S:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Renames first, so that nobody finds half a folder."""
    doomed = folder.with_name(f"pruned-{folder.name}-{os.getpid()}")
    with suppress(OSError):  # another process was faster
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _marker(number_format: str) -> Path | None:
    from numba.core import config

    folder = config.CACHE_DIR  # type: ignore[attr-defined]
    return Path(folder) / f"compiled-{number_format}-{kernel_cache_key()}" if folder else None
