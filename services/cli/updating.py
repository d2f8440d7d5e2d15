"""`penstock update` and `repartition`: other weights, and other cuts, for the running mesh."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from core.errors import NotFound, PenstockError
from services.cli import console
from services.cli.fetching import fetch_display
from services.cli.options import Key
from services.common import audit
from services.local.fetch import resolve_model
from services.local.repartition import Repartition, choose_split
from services.local.repartition import repartition as move_layers
from services.local.run_folder import MeshRecord, RunFolder, default_folder
from services.local.update import Update, update_stage


def update(
    *,
    stage: Annotated[
        int, typer.Option(envvar="PENSTOCK_STAGE", min=0, help="Which stage, from 0.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--weights",
            envvar="PENSTOCK_MODEL",
            help="The new weights, of the same shapes: a name, a file, a folder or a hub id.",
        ),
    ],
    key: Key = None,
) -> None:
    """Gives a stage other weights while the mesh serves; the other stages stay as they are."""
    run_folder, record = _running()
    with fetch_display() as report:
        path = resolve_model(model, report)
    change = Update(stage_index=stage, model_path=path)
    console.say(f"stage {stage} of {record.model} gets the weights of {path}")
    try:
        asyncio.run(
            update_stage(
                change,
                record=record,
                socket_path=run_folder.socket_path,
                key=key or None,
                say=console.say,
            )
        )
    except PenstockError as error:
        audit.record("stage not updated", stage=stage, model=str(path), why=str(error))
        raise
    audit.record("stage updated", stage=stage, model=str(path))
    console.say(f"stage {stage} is updated")


def repartition(
    *,
    split: Annotated[
        str | None,
        typer.Option(envvar="PENSTOCK_SPLIT", help="Layers of each stage, such as 0:14,14:30."),
    ] = None,
    stages: Annotated[
        int | None,
        typer.Option(envvar="PENSTOCK_STAGES", min=1, help="Instead: so many stages, balanced."),
    ] = None,
    now: Annotated[
        bool,
        typer.Option(
            "--now",
            envvar="PENSTOCK_NOW",
            help="Running sequences move at once, with a pause, instead of ending where they are.",
        ),
    ] = False,
    key: Key = None,
) -> None:
    """Moves layers between stages while the mesh serves; stages of both cuts are not touched."""
    run_folder, record = _running()
    chosen = choose_split(record, split=split, num_stages=stages)
    console.say(f"{record.model} is cut into {chosen}")
    try:
        asyncio.run(
            move_layers(
                Repartition(split=chosen, moves=now),
                record=record,
                socket_path=run_folder.socket_path,
                key=key or None,
                say=console.say,
            )
        )
    except PenstockError as error:
        audit.record("layers not moved", split=chosen, why=str(error))
        raise
    audit.record("layers moved", split=chosen)
    console.say("all layers are in their places")


def _running() -> tuple[RunFolder, MeshRecord]:
    """Raises NotFound where no mesh runs."""
    run_folder = RunFolder(default_folder())
    record = run_folder.running()
    if record is None:
        raise NotFound("no mesh is running: start one with `make mesh`")
    return run_folder, record
