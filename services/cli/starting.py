"""Shows how a mesh starts: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from services.cli import console
from services.local.layout import MeshLayout, replica_suffix
from services.local.progress import StageProgress

# For stages whose kernels are in no cache: after a change, or for a new number format.
COMPILING = "compiling kernels, up to a minute, only this once"


class StartDisplay:
    """To be used as a context around the start; `update` takes what the mesh reports."""

    def __init__(self, layout: MeshLayout) -> None:
        self._layout = layout
        self._stages: dict[str, StageProgress] = {}  # by the process's name
        self._started_at = time.monotonic()
        self._live = Live(console=console.out, get_renderable=self._table, refresh_per_second=8)
        self._is_live = console.out.is_terminal

    def __enter__(self) -> StartDisplay:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_live:
            self._live.stop()

    def update(self, stages: list[StageProgress]) -> None:
        """Takes the newest state of all stages."""
        for stage in stages:
            before = self._stages.get(stage.name)
            self._stages[stage.name] = stage
            if self._is_live:
                continue
            if stage.ready and not (before and before.ready):
                console.say(self._line(stage))
            elif stage.compiling and not (before and before.compiling):
                console.say(f"{_title(stage)}: {COMPILING}")

    @property
    def seconds(self) -> float:
        """Since this display was made."""
        return time.monotonic() - self._started_at

    def _line(self, stage: StageProgress) -> str:
        layers = self._layout.stages[stage.index].layers
        size = console.format_bytes(stage.weights_bytes)
        return f"{_title(stage)} ready: layers {layers}, {size}, {stage.load_s:.1f} s"

    def _table(self) -> Table:
        table = Table("stage", "layers", "weights", "read", "seconds", "state", box=None)
        for index, layout in enumerate(self._layout.stages):
            for one in layout.replicas:
                stage = StageProgress(index=index, replica=one.number, ready=False)
                stage = self._stages.get(stage.name, stage)
                suffix = replica_suffix(one.number) + (" (spare)" if one.is_spare else "")
                table.add_row(f"{index}{suffix}", layout.layers, *self._cells(stage))
        return table

    def _cells(self, stage: StageProgress) -> tuple[Text | Spinner, ...]:
        if not stage.ready:
            waiting = Spinner("dots", text=stage.problem or _doing(stage))
            return Text("-"), Text("-"), Text(f"{self.seconds:.1f}"), waiting
        return (
            Text(console.format_bytes(stage.weights_bytes)),
            Text(console.format_bytes(stage.bytes_read)),
            Text(f"{stage.load_s:.1f}"),
            Text("ready", style="green"),
        )


def _title(stage: StageProgress) -> str:
    return f"stage {stage.index}{replica_suffix(stage.replica)}"


def _doing(stage: StageProgress) -> str:
    return COMPILING if stage.compiling else "loading"
