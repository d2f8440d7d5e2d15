"""A file, made anew for each input, for readers that map files."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp())  # inside the run's own folder, which the parent removes


def fresh_folder() -> Path:
    """An empty folder, the same path for each input."""
    for path in _folder().iterdir():
        path.unlink()
    return _folder()


def fresh_file(data: bytes, *, suffix: str) -> Path:
    """A new file with these bytes. (Never an old one shortened: it may still be mapped.)"""
    path = fresh_folder() / f"input{suffix}"
    path.write_bytes(data)
    return path
