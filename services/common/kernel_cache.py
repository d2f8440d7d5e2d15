"""Where compiled kernels are kept between runs."""

from __future__ import annotations

from pathlib import Path

from core.kernels.fingerprint import kernel_cache_key


def use_kernel_cache(cache_folder: Path) -> Path:
    """Points numba at `cache_folder`/kernels/KEY, and returns that folder.

    The key covers all kernel sources, the CPU and numba's version, because numba's
    own index sees neither a changed callee in another module nor another CPU. To be
    called before the kernels are imported: numba asks for the folder when a function
    is decorated.
    """
    from numba.core import config

    folder = cache_folder / "kernels" / kernel_cache_key()
    folder.mkdir(parents=True, exist_ok=True)
    # numba sets its options dynamically.
    config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    return folder
