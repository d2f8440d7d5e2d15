"""Command-line options that every service takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Certs = Annotated[
    Path | None, typer.Option(help="folder of its identity, which `penstock certs` makes")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="listen beyond loopback without certificates")
]
