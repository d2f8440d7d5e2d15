"""`penstock manifest ...`: which bytes a model consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core.weights.manifest import read_manifest, verify
from services.cli import console
from services.cli.fetching import fetch_display
from services.local.fetch import resolve_model
from services.local.manifests import write_manifest_of

app = typer.Typer(
    help="SHA-256 manifests: a stage that is given one loads no other bytes.",
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="A name, a file, a folder or a hub id.")]


@app.command()
def make(model: Model, *, to: Annotated[Path, typer.Option(help="The manifest's file.")]) -> None:
    """Hashes a model tensor by tensor."""
    write_manifest_of(_find(model), to)
    console.say(str(to))


@app.command("verify")
def verify_model(
    model: Model, *, manifest: Annotated[Path, typer.Option(help="Its manifest.")]
) -> None:
    """Compares all bytes of a model with its manifest."""
    num_bytes = verify(_find(model), read_manifest(manifest))
    console.say(f"{console.format_bytes(num_bytes)} are as {manifest} says")


def _find(model: str) -> Path:
    with fetch_display() as report:
        return resolve_model(model, report)
