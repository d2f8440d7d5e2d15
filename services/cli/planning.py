"""`penstock models`, `pull`, `plan` and `warm`: what can be done without a running mesh."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from core.models.llama.weight_names import model_sizes
from core.models.registry import load_config
from core.weights.open import open_checkpoint
from services.cli import console
from services.cli.fetching import fetch_display
from services.local.catalogue import CATALOGUE, DEFAULT_MODEL
from services.local.fetch import fetch, fetched_path, resolve_model
from services.local.memory import POSITIONS_PER_BLOCK
from services.local.partition import PlannedStage, plan_stages
from services.local.settings import MeshSettings


def models() -> None:
    """Lists the models that can be had by name."""
    table = Table("name", box=None)
    for column in ("parameters", "download", "format"):
        table.add_column(column, justify="right")
    for column in ("licence", "cached", "what it is"):
        table.add_column(column)
    for model in CATALOGUE:
        table.add_row(
            model.name,
            f"{model.num_parameters / 1e6:,.0f} M",
            console.format_bytes(model.download_bytes),
            model.number_format,
            model.licence,
            "yes" if fetched_path(model) else "no",
            model.description,
        )
    console.out.print(table)


def pull(
    name: Annotated[
        str, typer.Argument(envvar="PENSTOCK_NAME", help="A name that `penstock models` shows.")
    ],
) -> None:
    """Fetches a model of the catalogue into the cache folder, and prints where it lies."""
    with fetch_display() as report:
        path = fetch(name, progress=report)
    console.say(str(path))


def plan(
    model: Annotated[
        str, typer.Argument(envvar="PENSTOCK_MODEL", help="A name, a file, a folder or a hub id.")
    ] = DEFAULT_MODEL,
    *,
    stages: Annotated[
        int, typer.Option(envvar="PENSTOCK_STAGES", help="How many stages share the layers.")
    ] = 2,
    dtype: Annotated[
        str, typer.Option(envvar="PENSTOCK_DTYPE", help="Number format: bf16 or fp32.")
    ] = "bf16",
    split: Annotated[
        str | None,
        typer.Option(envvar="PENSTOCK_SPLIT", help="Layers of each stage, such as 0:14,14:30."),
    ] = None,
) -> None:
    """Shows how a model would be cut, and starts nothing."""
    settings = MeshSettings(model=model, stages=stages, dtype=dtype, split=split)
    with fetch_display() as report:
        path = resolve_model(model, report)
    checkpoint = open_checkpoint(path)
    try:
        config = load_config(checkpoint)
        planned = plan_stages(settings, config, model_sizes(checkpoint, config))
    finally:
        checkpoint.close()
    console.out.print(plan_table(planned))


def plan_table(planned: tuple[PlannedStage, ...]) -> Table:
    """One row a stage."""
    table = Table("stage", "layers", "weights", "KV a token", box=None)
    for index, stage in enumerate(planned):
        table.add_row(
            str(index),
            f"{stage.slice.first_layer}:{stage.slice.end_layer}",
            console.format_bytes(stage.weights_bytes),
            console.format_bytes(stage.kv_block_bytes // POSITIONS_PER_BLOCK),
        )
    return table


def warm() -> None:
    """Compiles the kernels into the cache, so that stages start fast."""
