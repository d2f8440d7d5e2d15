"""Where the command line writes: answers to stdout, everything about them to stderr."""

from __future__ import annotations

import sys

import grpc
from rich.console import Console

from core.errors import InvalidInput, NotFound, PenstockError, PlanImpossible

# A pipe has no width: tables that go into one are as wide as they need.
PIPE_WIDTH = 200

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_USAGE_ERRORS = (InvalidInput, NotFound, PlanImpossible)


def say(text: str = "", *, style: str | None = None, to: Console = out) -> None:
    """Prints text as it is: not wrapped, and never taken for markup."""
    to.print(text, style=style, markup=False, soft_wrap=True)


def show_error(message: str) -> None:
    """Prints one line."""
    err.print("error:", style="bold red", end=" ")
    say(" ".join(message.split()), to=err)


def exit_code(error: PenstockError) -> int:
    """2 where the command was wrong, 1 where carrying it out failed."""
    return EXIT_USAGE if isinstance(error, _USAGE_ERRORS) else EXIT_FAILED


def describe_rpc_error(error: grpc.RpcError) -> str:
    """One line for a failed call: its status and message."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return str(error)
    return f"{error.code().name}: {error.details()}"


def format_bytes(size_bytes: int) -> str:
    """A size in binary units, three digits: "93.8 MiB"."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
