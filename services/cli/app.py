"""The commands, and what becomes of their errors: one line and an exit code."""

from __future__ import annotations

import sys

import grpc
import typer

from core.errors import PenstockError
from services.cli import (
    asking,
    auditing,
    certs,
    console,
    keys,
    manifests,
    planning,
    sealing,
    serving,
    updating,
)

app = typer.Typer(
    name="penstock",
    help="Serves models that are too big for one machine, as a pipeline of gRPC stages.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    serving.mesh,
    serving.stop,
    serving.status,
    updating.update,
    updating.repartition,
    asking.generate,
    asking.tokenize,
    planning.models,
    planning.pull,
    planning.plan,
    planning.warm,
):
    app.command()(command)
app.add_typer(certs.app, name="certs")
app.add_typer(keys.app, name="keys")
app.add_typer(auditing.app, name="audit")
app.add_typer(manifests.app, name="manifest")
app.add_typer(sealing.app, name="seal")


def run() -> None:
    """Parses `penstock COMMAND ...` and runs it."""
    try:
        app(prog_name="penstock")
    except PenstockError as error:
        console.show_error(str(error))
        sys.exit(console.exit_code(error))
    except grpc.RpcError as error:
        console.show_error(console.describe_rpc_error(error))
        sys.exit(console.EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(console.EXIT_INTERRUPTED)
