"""Where compiled kernels are kept between runs."""

from __future__ import annotations

from pathlib import Path

from core.kernels.fingerprint import kernel_cache_key


def use_kernel_cache(folder: Path) -> Path:
    """Points numba at `folder`/KEY, and returns that folder.

    The key covers all kernel sources, the CPU and numba's version, because numba's
    own index sees neither a changed callee in another module nor another CPU. To be
    called before the kernels are imported: numba asks for the folder when a function
    is decorated.
    """
    from numba.core import config

    keyed = folder / kernel_cache_key()
    keyed.mkdir(parents=True, exist_ok=True)
    # numba sets its options dynamically.
    config.CACHE_DIR = str(keyed)  # type: ignore[attr-defined]
    return keyed
