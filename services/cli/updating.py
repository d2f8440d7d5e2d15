"""`penstock update`: other weights for one stage of the running mesh."""

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
from services.local.run_folder import RunFolder, default_folder
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
    run_folder = RunFolder(default_folder())
    record = run_folder.running()
    if record is None:
        raise NotFound("no mesh is running: start one with `make mesh`")
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
