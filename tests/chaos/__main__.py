"""`python -m tests.chaos`: faults, one at a time, and a table of what became of every stream.

A mesh of real processes runs the same streams again and again; each time one part of it is hit at
a moment that the seed chooses. Every answer must be what it is without a fault, to the bit of each
log probability.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from core.models.registry import load_config
from core.weights.open import open_checkpoint
from services.cli.console import out as console
from services.local.fetch import resolve_model
from tests.chaos.campaigns import Campaign, choose_rounds, run_campaign, table
from tests.chaos.faults import find_faults
from tests.chaos.mesh import Shape
from tests.support.models import TinyModel, write_servable

# Meshes when none is asked for: replicas, spares and coordinators.
_MESHES = ((2, 0, 1), (1, 0, 1), (1, 1, 2))


def find_models(name: str, folder: Path) -> tuple[Path, ...]:
    """Those that updates take in turn: tiny ones of equal shapes unless one is named, for whose
    shape there is no other."""
    if name:
        return (resolve_model(name),)
    models = []
    for seed in (0, 1):
        (folder / str(seed)).mkdir()
        models.append(write_servable(folder / str(seed), TinyModel(seed=seed)))
    return tuple(models)


def _vocab_size(model: Path) -> int:
    checkpoint = open_checkpoint(model)
    try:
        return load_config(checkpoint).vocab_size
    finally:
        checkpoint.close()


def _title(replicas: int, spares: int, coordinators: int) -> str:
    parts = [(replicas, "replica"), (spares, "spare"), (coordinators, "coordinator")]
    return ", ".join(
        f"{count} {name}{'s' if count > 1 else ''}"
        for count, name in parts
        if count > (name == "coordinator")
    )


def main(
    faults: Annotated[int, typer.Option(envvar="PENSTOCK_FAULTS", help="How many.")] = 200,
    seed: Annotated[int, typer.Option(envvar="PENSTOCK_SEED", help="Of everything.")] = 1,
    streams: Annotated[
        int, typer.Option(envvar="PENSTOCK_STREAMS", help="Streams under each fault.")
    ] = 32,
    kinds: Annotated[
        str, typer.Option(envvar="PENSTOCK_KINDS", help="Parts of names of faults, with commas.")
    ] = "",
    model: Annotated[
        str, typer.Option(envvar="PENSTOCK_MODEL", help="A name or a path; default: a tiny one.")
    ] = "",
    dtype: Annotated[str, typer.Option(envvar="PENSTOCK_DTYPE")] = "bf16",
    device: Annotated[
        str, typer.Option(envvar="PENSTOCK_DEVICE", help="Of all stages: cpu or cuda.")
    ] = "cpu",
    replicas: Annotated[
        int, typer.Option(envvar="PENSTOCK_REPLICAS", help="Of each stage; default: three meshes.")
    ] = 0,
    spares: Annotated[
        int, typer.Option(envvar="PENSTOCK_SPARES", help="Further ones that wait, of each stage.")
    ] = 0,
    coordinators: Annotated[int, typer.Option(envvar="PENSTOCK_COORDINATORS")] = 1,
) -> None:
    """Runs a campaign on each mesh, the faults shared out among them, and prints the table."""
    one_is_asked_for = replicas or spares or coordinators > 1
    meshes = ((max(replicas, 1), spares, coordinators),) if one_is_asked_for else _MESHES
    chosen = list(choose_rounds(find_faults(kinds), count=faults, seed=seed))
    results = []
    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as name:
        folder = Path(name)
        models = find_models(model, folder)
        for index, (num_replicas, num_spares, num_coordinators) in enumerate(meshes):
            campaign = Campaign(
                title=_title(num_replicas, num_spares, num_coordinators),
                shape=Shape(
                    models=models,
                    number_format=dtype,
                    device=device,
                    num_replicas=num_replicas,
                    num_spares=num_spares,
                    num_coordinators=num_coordinators,
                    seed=seed,
                ),
                vocab_size=_vocab_size(models[0]),
                num_streams=streams,
                rounds=tuple(chosen[index :: len(meshes)]),
            )
            done = asyncio.run(run_campaign(campaign, folder=folder))
            results += [(campaign.title, result) for result in done]
    console.print(table(results))
    if any(one.lost or one.changed or one.recovery_s is None for _, one in results):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
