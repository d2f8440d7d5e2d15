"""`penstock COMMAND ...`."""

from __future__ import annotations

import sys

from services.local.fork_server import launched


def main() -> None:
    """Entry point of the `penstock` command."""
    if sys.argv[1:2] == ["mesh"] and "--help" not in sys.argv:
        launched()  # at work while this process imports what it needs itself
    from services.cli.app import run

    run()


if __name__ == "__main__":
    main()
