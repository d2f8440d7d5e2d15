"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Key = Annotated[
    str | None,
    typer.Option(
        envvar="PENSTOCK_KEY",
        help="API key, where the mesh asks for one. The environment hides it from other users, "
        "a command line does not.",
    ),
]
NumberFormat = Annotated[
    str,
    typer.Option(
        envvar="PENSTOCK_DTYPE",
        help="Number format: bf16, fp32, int8, int4, or auto: as the file and the CPU suggest.",
    ),
]

SealKeysFolder = Annotated[
    Path | None,
    typer.Option(
        "--seal-keys",
        envvar="PENSTOCK_SEAL_KEYS",
        help="Folder with the keys of sealed models. Default: ~/.config/penstock/seal-keys.",
    ),
]
