"""`make security`: tries long and hard to break what SECURITY.md promises, and prints a table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from services.cli.console import out as console
from services.cli.console import say
from tests.security.promises import NOT_PROMISED, PROMISES
from tests.security.trying import Effort, Step, Tried, steps

# A parser costs less than an RPC.
PARSER_FACTOR = 5


def table(rows: Sequence[Tried]) -> Table:
    """What goes into SECURITY.md."""
    made = Table("promise", "test", "tried", "refused", "slipped through")
    told = ""
    for row in rows:
        counts = (f"{row.num_tried:,}", f"{row.num_refused:,}", str(len(row.slipped)))
        made.add_row("" if row.promise == told else row.promise, row.test, *counts)
        told = row.promise
    return made


def perform(steps: Sequence[Step]) -> list[Tried]:
    """Shows how far each is, and says what came of it when it is over."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, transient=True) as progress:
        for number, step in enumerate(steps, 1):
            task = progress.add_task(step.name, total=step.size)
            started_s = time.monotonic()
            row = step.run(partial(progress.advance, task))
            progress.remove_task(task)
            counts = f"{row.num_tried:,} tried, {len(row.slipped)} slipped through"
            took = f"{time.monotonic() - started_s:.1f} s"
            say(f"{number}/{len(steps)} {step.name}: {counts}, {took}", to=progress.console)
            rows.append(row)
    return rows


def main(
    executions: Annotated[
        int, typer.Option(envvar="PENSTOCK_EXECUTIONS", help="For each RPC; parsers get five.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(envvar="PENSTOCK_SEED", help="Of all fuzzers.")] = 1,
    json_path: Annotated[
        Path | None, typer.Option("--json", envvar="PENSTOCK_JSON", help="Where to write it all.")
    ] = None,
    only: Annotated[str, typer.Option(help="Part of the names of tests and fuzzers.")] = "",
) -> None:
    """Exits with 1 when anything slipped through."""
    effort = Effort(
        rpc_executions=executions, parser_executions=PARSER_FACTOR * executions, seed=seed
    )
    with steps([*PROMISES, NOT_PROMISED], effort) as all_steps:
        rows = perform([step for step in all_steps if only in step.name])
    console.print(table(rows))
    for row in rows:
        for what in row.slipped:
            console.print(f"{row.test}: {what}", markup=False)
    if json_path is not None:
        made = {"at": datetime.now(UTC).isoformat(), "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(made, indent=1))
    if any(row.slipped for row in rows):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
