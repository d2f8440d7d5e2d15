"""`penstock seal ...`: models that only the holders of their keys can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from core.errors import InvalidInput
from core.weights.sealed.header import SealHeader, read_header
from core.weights.sealed.identity import OWNER, read_public_identity, write_identity
from services.cli import console
from services.cli.fetching import fetch_display
from services.cli.options import SealKeysFolder
from services.common import audit
from services.local.fetch import resolve_model
from services.local.key_files import public_key, stage_name
from services.local.prepare import model_name
from services.local.sealing import SealWishes, parse_holder, rewrap_model, seal_model
from services.local.settings import default_keys_folder

app = typer.Typer(
    help="Seals models: each stage can open its own layers, and nobody else any.",
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(help="The sealed folder.")]
Stages = Annotated[int, typer.Option(help="How many stages share the layers.")]
Split = Annotated[str | None, typer.Option(help="Layers of each stage, such as 0:15,15:30.")]
Holders = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        help="STAGE=FILE: a public key that may open this stage, such as stage-0=host.pub; may be "
        "given again, and stage-0-b=... for a second holder. Default: the keys in --seal-keys.",
    ),
]


@app.command()
def keygen(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names. Default: owner, and stage-0 and so on up to --stages."),
    ] = None,
    *,
    stages: Stages = 2,
    keys: SealKeysFolder = None,
) -> None:
    """Makes identities: NAME.key, which never leaves its machine, and NAME.pub."""
    for name in names or [OWNER, *map(stage_name, range(stages))]:
        path = write_identity(keys or default_keys_folder(), name)
        audit.record("seal key made", name=name, path=str(path))
        console.say(str(path))


@app.command()
def make(
    model: Annotated[str, typer.Argument(help="A name, a file, a folder or a hub id.")],
    *,
    to: Annotated[Path, typer.Option(help="A new or empty folder.")],
    stages: Stages = 2,
    split: Split = None,
    holders: Holders = None,
    version: Annotated[str, typer.Option(help="Which version of the model this is.")] = "1",
    keys: SealKeysFolder = None,
) -> None:
    """Writes a sealed copy of a model, signed by the owner in the keys folder."""
    with fetch_display() as report:
        path = resolve_model(model, report)
    name = model_name(model, path)
    seal_model(path, to, _wishes(keys, stages, split, holders), name=name, version=version)
    audit.record("model sealed", model=name, version=version, folder=str(to))
    console.say(f"{to} is {name}, version {version}, sealed")


@app.command()
def rewrap(
    folder: Folder,
    *,
    stages: Annotated[int | None, typer.Option(help="Deals out the layers anew.")] = None,
    split: Split = None,
    holders: Holders = None,
    revoke: Annotated[
        list[str] | None, typer.Option(help="A holder that gets no keys any more; may be repeated.")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Holders can still open what they could: while a mesh moves from one cut to "
            "the other.",
        ),
    ] = False,
    keys: SealKeysFolder = None,
) -> None:
    """Changes who can open which layers, without touching the weights.

    A holder that is revoked may have kept the keys that it had: seal anew where that matters.
    """
    if holders and stages is None and split is None:
        raise InvalidInput("split", "", "given, or --stages, so that it is clear who holds what")
    deals = stages is not None or split is not None
    wishes = _wishes(keys, stages or 2, split, holders)
    header = rewrap_model(folder, wishes, revoked=revoke or (), deals=deals, keeps=keep)
    facts = {"model": header.model, "version": header.version, "sealing": header.seal_id}
    holders_now, revoked = " ".join(header.holders), " ".join(revoke or ())
    audit.record("model rewrapped", **facts, holders=holders_now, revoked=revoked)
    _show_holders(header)


@app.command()
def show(folder: Folder, *, keys: SealKeysFolder = None) -> None:
    """Checks the owner's signature, and says who can open what."""
    sealer = read_public_identity(public_key(keys or default_keys_folder(), OWNER))
    header = read_header(folder, sealer=sealer)
    console.say(f"{header.model}, version {header.version}, sealing {header.seal_id}")
    _show_holders(header)


def _wishes(
    keys: Path | None, stages: int, split: str | None, holders: Sequence[str] | None
) -> SealWishes:
    return SealWishes(
        keys=keys or default_keys_folder(),
        num_stages=stages,
        split=split,
        holders=dict(map(parse_holder, holders or ())),
    )


def _show_holders(header: SealHeader) -> None:
    for name, holder in header.holders.items():
        console.say(f"{name}: {', '.join(sorted(holder.wraps, key=_in_order))}")


def _in_order(part: str) -> tuple[str, int]:
    name, _, number = part.partition("-")
    return name, int(number) if number.isdecimal() else 0
