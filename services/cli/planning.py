"""`penstock models`, `pull`, `plan` and `warm`: what can be done without a running mesh."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from core.errors import InvalidInput
from core.pipeline.plan import PipelinePlan
from services.cli import console
from services.cli.fetching import fetch_display
from services.cli.options import NumberFormat, SealKeysFolder
from services.local.catalogue import CATALOGUE, DEFAULT_MODEL
from services.local.fetch import fetch, fetched_path, resolve_model
from services.local.number_format import automatic_formats
from services.local.partition import plan_stages
from services.local.prepare import read_model
from services.local.seal_keys import follow_seal, seal_keys
from services.local.settings import MeshSettings, default_keys_folder, parse_bytes
from services.local.warm import warm_kernels


def models() -> None:
    """Lists the models that can be had by name."""
    table = Table(box=None)
    table.add_column("name", no_wrap=True)
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
    if not name:
        names = ", ".join(model.name for model in CATALOGUE)
        raise InvalidInput("NAME", name, f"a model of the catalogue: {names}")
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
    dtype: NumberFormat = "auto",
    split: Annotated[
        str | None,
        typer.Option(envvar="PENSTOCK_SPLIT", help="Layers of each stage, such as 0:14,14:30."),
    ] = None,
    keys: SealKeysFolder = None,
    memory: Annotated[
        str | None,
        typer.Option(
            envvar="PENSTOCK_MEMORY",
            help="What each stage's node has: 8GiB for all, or 8GiB,4GiB one by one.",
        ),
    ] = None,
) -> None:
    """Shows how a model would be cut, and starts nothing."""
    settings = follow_seal(
        MeshSettings(
            model=model,
            stages=stages,
            dtype=dtype,
            split=split,
            seal_keys=keys or default_keys_folder(),
        )
    )
    with fetch_display() as report:
        path = resolve_model(model, report)
    facts = read_model(path, dtype=dtype, keys=seal_keys(path, settings.seal_keys))
    planned = plan_stages(
        facts.config,
        number_format=facts.number_format,
        num_stages=settings.num_stages,
        split=settings.split,
        memory_bytes=_memory_of_nodes(memory, num_stages=settings.num_stages),
    )
    console.say(f"{model} in {facts.number_format}:")
    console.out.print(plan_table(planned, context_length=facts.config.context_length))


def _memory_of_nodes(text: str | None, *, num_stages: int) -> tuple[int, ...]:
    if text is None:
        return ()
    sizes = tuple(parse_bytes("memory", part) for part in text.split(","))
    return sizes * num_stages if len(sizes) == 1 else sizes


def plan_table(planned: PipelinePlan, *, context_length: int) -> Table:
    """One row a stage."""
    table = Table("stage", "layers", box=None)
    kv_column = f"KV of {context_length} tokens"
    for column in ("weights", kv_column, "in all", "time of a micro-batch", "of the slowest"):
        table.add_column(column, justify="right")
    for index, stage in enumerate(planned.stages):
        table.add_row(
            str(index),
            f"{stage.stage_slice.first_layer}:{stage.stage_slice.end_layer}",
            console.format_bytes(stage.weights_bytes),
            console.format_bytes(stage.kv_bytes),
            console.format_bytes(stage.weights_bytes + stage.kv_bytes),
            f"{stage.seconds * 1e3:.1f} ms",
            f"{stage.time_share:.0%}",
        )
    return table


def warm(
    *,
    dtype: Annotated[
        str,
        typer.Option(
            envvar="PENSTOCK_DTYPE",
            help="Number format: bf16, fp32, int8, int4, or auto for all that auto may stand for.",
        ),
    ] = "auto",
) -> None:
    """Compiles the kernels for this machine into the cache, so that stages start fast."""
    settings = MeshSettings(dtype=dtype)
    for name in automatic_formats() if settings.dtype == "auto" else (settings.dtype,):
        console.say(f"Compiling the {name} kernels for this machine; a minute the first time")
        seconds = warm_kernels(name)
        console.say(f"The {name} kernels are ready after {seconds:.1f} s")
