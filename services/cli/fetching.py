"""Shows how a model is fetched: one progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from services.cli import console
from services.local.fetch import FetchProgress, Report


@contextmanager
def fetch_display() -> Iterator[Report]:
    """Yields what takes the reports of a fetch. Nothing is shown where nothing is fetched."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console.err)
    task = bar.add_task("", visible=False)
    step = ""

    def report(progress: FetchProgress) -> None:
        nonlocal step
        if not console.err.is_terminal:
            if progress.step != step:
                size = console.format_bytes(progress.total_bytes)
                console.say(f"{progress.step} {progress.model} ({size})", to=console.err)
        elif not bar.live.is_started:
            bar.start()
        step = progress.step
        bar.update(
            task,
            description=f"{progress.step} {progress.model}",
            completed=progress.done_bytes,
            total=progress.total_bytes,
            visible=True,
        )

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
