"""The kernel cache: machine code lands in the folder named by what it depends on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from core.kernels.fingerprint import kernel_cache_key

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
from services.common.kernel_cache import use_kernel_cache

use_kernel_cache(Path(sys.argv[1]))
from core.kernels.compile import CACHE_FOLDER
from numba.core import config

print(config.CACHE_DIR)
"""


def test_kernels_are_cached_below_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / kernel_cache_key()
    assert (tmp_path / kernel_cache_key()).is_dir()
