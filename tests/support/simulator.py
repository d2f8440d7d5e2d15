"""Runs tests in another process, under numba's CUDA simulator.

The simulator is chosen when numba is first imported, hence the other process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Generous: every CUDA thread is a Python thread here, on a machine that may be busy.
TIMEOUT_S = 400


def check_under_simulator(folder: Path) -> None:
    """Runs every CUDA test of the folder; all must pass, and none be skipped."""
    files = sorted(str(path) for path in folder.glob("test_cuda_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command + files,
        cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S - 20,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary), summary
    assert "skipped" not in summary
