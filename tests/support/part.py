"""Stands for a part of a mesh where a test is about processes and not about models.

`python -m tests.support.part HOW`: "serve" runs until SIGTERM, "stubborn" ignores it, "fail"
says why and exits with 1, "say WORDS" says them and serves, "once FILE" serves after it has
failed one time, "sign FILE NAME" serves and adds its name to the file when it ends.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def main() -> None:
    how = sys.argv[1]
    first_time = how == "once" and not Path(sys.argv[2]).exists()
    if first_time:
        Path(sys.argv[2]).touch()
    if how == "fail" or first_time:
        sys.exit("error: no layers left")
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if how == "sign":
        signal.signal(signal.SIGTERM, sign)
    print(sys.argv[2] if how == "say" else "serving", flush=True)
    while True:
        signal.pause()


def sign(*_: object) -> None:
    with open(sys.argv[2], "a") as file:
        file.write(sys.argv[3] + "\n")
    sys.exit(0)


if __name__ == "__main__":
    main()
