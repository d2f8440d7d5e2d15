"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NumberFormat = Annotated[
    str,
    typer.Option(
        envvar="PENSTOCK_DTYPE",
        help="Number format: bf16, fp32, int8, int4, or auto: as the file and the CPU suggest.",
    ),
]

KeysFolder = Annotated[
    Path | None,
    typer.Option(
        envvar="PENSTOCK_KEYS",
        help="Folder with the keys of sealed models. Default: ~/.config/penstock/keys.",
    ),
]
