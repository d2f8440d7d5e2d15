"""The kernel cache: machine code lands in the folder named by what it depends on, for everyone."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core.kernels.cache import LOCK
from core.kernels.fingerprint import kernel_cache_key
from services.common.kernel_cache import NUM_KEPT, SPARED_S, prune

ROOT = Path(__file__).resolve().parents[3]
COMPILING = """
import numpy as np
from core.kernels.packing.cpu import gather_rows

rows = np.arange(32, dtype=np.float32).reshape(2, 16)
target = np.zeros((1, 16), np.float32)
gather_rows(rows, np.array([1], np.int32), 1, target)
assert (target[0] == rows[1]).all()
counts = gather_rows.stats
print(f"{sum(counts.cache_hits.values())} hits, {sum(counts.cache_misses.values())} misses")
"""


def hits_and_misses(checkout: Path, *, cache: Path) -> str:
    """Of a kernel that a process calls from a folder of its own with the same sources."""
    if not checkout.exists():
        checkout.mkdir()
        (checkout / "core").symlink_to(ROOT / "core")
    folders = {"PENSTOCK_CACHE": cache, "XDG_CACHE_HOME": cache, "PYTHONPATH": checkout}
    own = {name: str(folder) for name, folder in folders.items()} | {"NUMBA_CACHE_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILING],
        cwd=checkout,
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_kernel_is_compiled_once_for_all_installations_of_the_same_sources(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    first = hits_and_misses(tmp_path / "first", cache=cache)
    second = hits_and_misses(tmp_path / "second", cache=cache)
    assert (first, second) == ("0 hits, 1 misses", "1 hits, 0 misses")
    assert [path.name for path in (cache / "kernels").iterdir()] == [f"numba-{kernel_cache_key()}"]


def test_one_process_at_a_time_keeps_what_it_compiled(tmp_path: Path) -> None:
    """Of two that number their files alike, the second would overwrite the first one's."""
    cache = tmp_path / "cache"
    hits_and_misses(tmp_path / "first", cache=cache)
    kept = sorted((cache / "kernels").rglob("*gather_rows-*"))
    for file in kept:
        file.unlink()
    [folder] = {file.parent for file in kept}
    with (folder / LOCK).open() as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(hits_and_misses, tmp_path / "second", cache=cache)
        waiter = f"-> FLOCK  ADVISORY  WRITE .*:{os.fstat(lock.fileno()).st_ino} "
        while not re.search(waiter, Path("/proc/locks").read_text()):
            assert not second.done()
        assert not any(file.exists() for file in kept)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result() == "0 hits, 1 misses"
    assert all(file.exists() for file in kept)


def test_where_nothing_can_be_written_a_process_compiles_for_itself(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.touch()  # no folder can be made there
    checkout = tmp_path / "checkout"
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "core", checkout / "core", ignore=leave_out)
    for folder in (checkout / "core").rglob("*/"):
        (folder / "__pycache__").touch()
    for _ in range(2):
        assert hits_and_misses(checkout, cache=cache) == "0 hits, 1 misses"


def make_folder(parent: Path, name: str, *, age_s: float) -> Path:
    folder = parent / name
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "kernel.nbc").touch()
    then = time.time() - age_s
    os.utime(folder, (then, then))
    return folder


def test_only_the_newest_of_the_old_kernels_are_kept(tmp_path: Path) -> None:
    used = make_folder(tmp_path, f"numba-{kernel_cache_key()}", age_s=0)
    lately = [make_folder(tmp_path, f"numba-{n:016x}", age_s=n) for n in range(NUM_KEPT + 2)]
    old = [make_folder(tmp_path, f"numba-{n:016x}", age_s=SPARED_S + n) for n in range(100, 120)]
    foreign = [make_folder(tmp_path, name, age_s=1e6) for name in ("x", "numba-x", f"{5:016x}")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(prune, [used] * 8))
    assert set(tmp_path.iterdir()) == {used, *lately, *foreign}
    assert not any(folder.exists() for folder in old)
