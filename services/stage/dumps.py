"""Keeps this process's memory, which has weights in the clear, out of files."""

from __future__ import annotations

import ctypes
import logging
import resource
import sys
from pathlib import Path

_LOG = logging.getLogger(__name__)
_PR_SET_DUMPABLE = 4  # linux/prctl.h
_SWAPS = Path("/proc/swaps")


def forbid_dumps() -> None:
    """No core dumps from now on, neither to a file nor to a program that collects them; and no
    debugger of the same user. Warns where memory may be swapped out, which only the machine's
    owner can change."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if _SWAPS.exists() and len(_SWAPS.read_text().splitlines()) > 1:
        _LOG.warning("swap is on: weights in the clear may reach the disk unless it is encrypted")
