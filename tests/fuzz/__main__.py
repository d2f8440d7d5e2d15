"""`python -m tests.fuzz --target gguf --executions 100000 --seed 1`: fuzzes, prints a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.registry import TARGETS
from tests.fuzz.running import FuzzResult, run


def main() -> int:
    options = _parse_options()
    print(
        f"{'target':<20}{'executions':>11}{'s':>8}{'findings':>9}{'slowest':>10}{'largest':>10}{'edges':>7}"
    )
    results = []
    for name in options.target or sorted(TARGETS):
        results.append(run(name, executions=options.executions, seed=options.seed))
        print(_row(results[-1]), flush=True)
    for result in results:
        _show_findings(result, options.findings)
    return int(any(result.findings for result in results))


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--executions", type=int, default=10_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, help="folder that inputs with findings go to")
    return parser.parse_args()


def _row(result: FuzzResult) -> str:
    return (
        f"{result.target:<20}{result.executions:>11,}{result.seconds:>8.1f}"
        f"{len(result.findings):>9}{result.slowest_input_s * 1e3:>7.1f} ms"
        f"{result.largest_allocation_bytes / 1024:>6.0f} KiB{result.edges:>7}"
    )


def _show_findings(result: FuzzResult, folder: Path | None) -> None:
    for number, finding in enumerate(result.findings):
        print(f"{result.target}: {finding.what}\n  input: {finding.input[:200]!r}")
        if folder is not None:
            path = folder / result.target / str(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(finding.input)


if __name__ == "__main__":
    sys.exit(main())
