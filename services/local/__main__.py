"""The supervisor of a mesh in the background: `python -m services.local RUN_FOLDER < layout`.

Two more arguments, where there are such, are the socket and the process id of a fork server.

Says how the start goes on stdout, one JSON object a line: {"progress": [...]}, then
{"ready": true} or {"error": "..."}; then it closes stdout and goes on serving. Later
lines for people go to stderr, which whoever starts this sends to a log file.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from core.errors import PenstockError
from services.local.fork_server import ForkServerHandle
from services.local.layout import MeshLayout
from services.local.progress import StageProgress
from services.local.run_folder import RunFolder
from services.local.supervisor import Listener, supervise


def say_to_starter(fields: dict[str, object]) -> None:
    print(json.dumps(fields), flush=True)


def report_progress(stages: list[StageProgress]) -> None:
    say_to_starter({"progress": [asdict(stage) for stage in stages]})


async def report_ready() -> None:
    say_to_starter({"ready": True})
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def say(line: str) -> None:
    """Writes to the log, with the time of day."""
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", file=sys.stderr, flush=True)


def main() -> None:
    run_folder = RunFolder(Path(sys.argv[1]))
    fork_server = None
    if len(sys.argv) > 2:
        fd, pid = map(int, sys.argv[2:])
        fork_server = ForkServerHandle(socket.socket(fileno=fd), pid)
    layout = MeshLayout.from_json(sys.stdin.read())
    listener = Listener(progress=report_progress, ready=report_ready, say=say)
    try:
        asyncio.run(
            supervise(layout, run_folder=run_folder, listener=listener, fork_server=fork_server)
        )
    except PenstockError as error:
        say(str(error))
        say_to_starter({"error": str(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
