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


def end_with_supervisor(lifeline_fd: int) -> None:
    """Blocks until the supervisor is gone, then drains this process, or ends it if that fails."""
    while os.read(lifeline_fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


def main() -> None:
    lifeline_fd, module, *arguments = sys.argv[1:]
    threading.Thread(target=end_with_supervisor, args=(int(lifeline_fd),), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
