"""`penstock audit verify` and `show`: what was done to a deployment, and whether that is all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from services.cli import console
from services.common.audit_check import read_lines
from services.common.audit_check import verify as verify_log
from services.common.data_folder import AUDIT_NAME, default_data_folder

app = typer.Typer(help="Checks and shows the audit log.", rich_markup_mode=None)

File = Annotated[Path | None, typer.Argument(help="The log. Default: this machine's.")]


@app.command()
def verify(
    file: File = None,
    *,
    expect_head: Annotated[
        str | None,
        typer.Option(
            help="A hash that this command once showed and that was kept elsewhere: the log must "
            "still hold that line."
        ),
    ] = None,
) -> None:
    """Fails, naming the line, where one was removed, changed or moved; else shows the head."""
    verdict = verify_log(file or _default_file(), expected_head=expect_head)
    for note in verdict.notes:
        console.say(f"note: {note}", to=console.err)
    console.say(f"{verdict.head.sequence} lines are whole; head {verdict.head.hash}")


@app.command()
def show(file: File = None) -> None:
    """Shows the log as a table; `verify` says whether to believe it."""
    table = Table("number", "time", "actor", "event", "details", box=None)
    for line in read_lines(file or _default_file()):
        # As JSON: whatever a line holds, the terminal must not obey it.
        details = json.dumps(line.details)
        words = (json.dumps(word)[1:-1] for word in (line.time, line.actor, line.event))
        table.add_row(str(line.sequence), *map(Text, words), Text(details))
    console.out.print(table)


def _default_file() -> Path:
    return default_data_folder() / AUDIT_NAME
