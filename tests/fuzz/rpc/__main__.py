"""`python -m tests.fuzz.rpc --executions 2000 --seed 1`: fuzzes the RPCs of running servers."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests.fuzz.rpc.methods import METHODS
from tests.fuzz.rpc.servers import serving
from tests.fuzz.rpc.trial import fuzz_rpc
from tests.fuzz.running import FuzzResult


def main(
    executions: Annotated[int, typer.Option(help="sequences for each RPC")] = 2000,
    seed: Annotated[int, typer.Option()] = 1,
    method: Annotated[str, typer.Option(help="part of the names of RPCs; default: all")] = "",
    findings: Annotated[Path | None, typer.Option(help="where findings' messages go")] = None,
) -> None:
    """Prints a line for each RPC and all findings."""
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="penstock-fuzz-") as folder,
        serving(Path(folder)) as it,
    ):
        for name in METHODS:
            if method in name:
                results.append(fuzz_rpc(it, name, executions=executions, seed=seed))
                show(results[-1], findings)
    sys.exit(int(any(result.findings for result in results)))


def show(result: FuzzResult, folder: Path | None) -> None:
    """Prints what came of an RPC; keeps the messages of its findings."""
    print(
        f"{result.target:<45}{result.executions:>8,}{result.seconds:>8.1f} s"
        f"{len(result.findings):>4} findings, slowest {result.slowest_input_s:.2f} s, "
        f"grown by {result.largest_allocation_bytes >> 20} MiB",
        flush=True,
    )
    for number, finding in enumerate(result.findings):
        print(f"  {finding.what}", flush=True)
        if folder is not None and finding.input:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{result.target}-{number}").write_bytes(finding.input)


if __name__ == "__main__":
    typer.run(main)
