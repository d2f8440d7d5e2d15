"""A process with sealed layers in the clear leaves no core dump."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import ctypes, resource
from services.stage.dumps import forbid_dumps
forbid_dumps()
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


def test_no_core_is_dumped_to_a_file_or_a_collector() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "(0, 0) 0\n"  # 3 is PR_GET_DUMPABLE
