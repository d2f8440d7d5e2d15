"""Runs a service as a child that never outlives its supervisor, however that one ends.

`python -m services.local.child FD MODULE ARGUMENT...` runs MODULE as `python -m` would.
FD is the reading end of a pipe whose other end only the supervisor holds: when the
supervisor dies, even by SIGKILL, the pipe ends, and the child ends itself.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

GRACE_S = 5.0
# Each process computes on one thread of its own: pools of threads larger than the cores that
# a process really has make each other wait.
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "RAYON_NUM_THREADS",
    )
}


def end_with_supervisor(lifeline_fd: int) -> None:
    """Blocks until the supervisor is gone, then drains this process, or ends it if that fails."""
    while os.read(lifeline_fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


def run_child(lifeline_fd: int, module: str, arguments: list[str]) -> None:
    """Runs the module in this process, until it or the supervisor ends."""
    threading.Thread(target=end_with_supervisor, args=(lifeline_fd,), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    lifeline_fd, module, *arguments = sys.argv[1:]
    run_child(int(lifeline_fd), module, arguments)
