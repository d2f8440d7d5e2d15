"""`penstock certs`: identities for the parts of a mesh, from an authority for development."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli import console
from services.common import audit
from services.common.credentials import AUTHORITY_DAYS, IDENTITY_DAYS

DEFAULT_FOLDER = Path("certs")

app = typer.Typer(
    help="Makes certificates with which the parts of a mesh know each other (mTLS).",
    rich_markup_mode=None,
    no_args_is_help=True,
)
Folder = Annotated[
    Path, typer.Option(envvar="PENSTOCK_CERTS", help="Where the authority and all identities are.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        envvar="PENSTOCK_HOST",
        help="Name or address under which clients reach it, besides localhost; may be given "
        "again. What counts between the parts is the role, wherever they run.",
    ),
]
Days = Annotated[int, typer.Option(min=1, max=AUTHORITY_DAYS, help="How long they are valid.")]


@app.command()
def init(
    *,
    folder: Folder = DEFAULT_FOLDER,
    mesh: Annotated[
        str, typer.Option(help="The mesh's name; parts of another mesh are strangers.")
    ] = "local",
    stages: Annotated[
        int, typer.Option(envvar="PENSTOCK_STAGES", min=1, help="How many stages get an identity.")
    ] = 2,
    host: Hosts = None,
    days: Days = IDENTITY_DAYS,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replaces an authority: what it has certified is void."),
    ] = False,
) -> None:
    """Makes an authority, and identities of all parts of a mesh.

    Copy FOLDER/ROLE to the machine of that part, and start it with --certs; FOLDER/ca.key stays
    with whoever may add parts.
    """
    # Imported here: takes 60 ms, of which other commands need not know.
    from services.common.certificates import make_mesh

    make_mesh(
        folder.expanduser(),
        mesh=mesh,
        num_stages=stages,
        hosts=host or (),
        days=days,
        replaces=replace,
    )
    audit.record("certificates made", mesh=mesh, stages=stages, folder=str(folder), days=days)
    console.say(f"identities of mesh {mesh} with {stages} stages are in {folder}")


@app.command()
def renew(
    role: Annotated[
        str, typer.Argument(help="gateway, coordinator, supervisor, operator or stage/N.")
    ],
    *,
    folder: Folder = DEFAULT_FOLDER,
    host: Hosts = None,
    days: Days = IDENTITY_DAYS,
    revoke: Annotated[
        bool,
        typer.Option("--revoke", help="Shuts out whoever shows the certificate that it had."),
    ] = False,
) -> None:
    """Makes one identity, or gives it a new key and certificate, with the hosts that it had.

    Running parts take replaced files for new connections, without a restart; revoked.txt, which
    says what is shut out, for each new call.
    """
    from services.common.certificates import issue

    own = issue(folder.expanduser(), role, hosts=host, days=days, revokes=revoke)
    audit.record("certificate renewed", identity=str(own), days=days, revoked_the_old_one=revoke)
    console.say(f"{own} has a certificate for {days} days")
