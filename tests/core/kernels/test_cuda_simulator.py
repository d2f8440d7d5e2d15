"""Every CUDA kernel test, run under numba's simulator where there is no device.

The simulator is chosen when numba is first imported, hence the other process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


def test_cuda_kernels_equal_their_references_under_the_simulator() -> None:
    files = sorted(str(path) for path in FOLDER.glob("test_cuda_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command + files,
        cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary), summary
    assert "skipped" not in summary
