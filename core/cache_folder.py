"""Where what took long to make is kept between runs: models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PENSTOCK_CACHE` or `~/.cache/penstock`; raises RuntimeError where there is no home."""
    folder = os.environ.get("PENSTOCK_CACHE") or "~/.cache/penstock"
    return Path(folder).expanduser().absolute()
