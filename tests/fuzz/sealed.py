"""Headers of sealed models, as they are once their signature has been found right."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from core.errors import SealBroken
from core.weights.sealed.header import HEADER_NAME, parse_body
from tests.fuzz.json_damage import damage_json
from tests.fuzz.target import FuzzTarget
from tests.support.seal_headers import header_body

_KEYS = ("model", "version", "files", "tensors", "holders", "wraps", "companions", "x")


def make_target() -> FuzzTarget:
    return FuzzTarget(
        try_input=_parse,
        refusals=(SealBroken,),
        seeds=[header_body()],
        mutate=partial(damage_json, keys=_KEYS),
    )


def _parse(data: bytes) -> None:
    header = parse_body(data, path=Path(HEADER_NAME))
    if any(Path(file.name).name != file.name for file in header.files):
        raise AssertionError("a file outside of the folder was accepted")
