"""Headers of sealed models, as they are once their signature has been found right."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from core.errors import SealBroken
from core.weights.sealed.header import (
    HEADER_NAME,
    MAGIC,
    SIGNATURE_BYTES,
    Holder,
    SealedFile,
    SealedTensor,
    SealHeader,
    parse_body,
    write_header,
)
from core.weights.sealed.identity import make_identity
from tests.fuzz.json_damage import damage_json
from tests.fuzz.target import FuzzTarget

_HEADER = SealHeader(
    model="m",
    version="1",
    seal_id="0" * 32,
    format="gguf",
    files=(
        SealedFile(
            name="m.gguf",
            prefix_bytes=10,
            prefix_sha256="a" * 64,
            tensors=(
                SealedTensor(name="t", size_bytes=5, part="layer-0"),
                SealedTensor(name="u", size_bytes=7, part="head"),
            ),
        ),
    ),
    companions={"tokenizer.json": "b" * 64},
    holders={"owner": Holder(opening_key=bytes(32), wraps={"layer-0": bytes(80)})},
)
_KEYS = ("model", "version", "files", "tensors", "holders", "wraps", "companions", "x")


def make_target() -> FuzzTarget:
    return FuzzTarget(
        try_input=_parse,
        refusals=(SealBroken,),
        seeds=[_body()],
        mutate=partial(damage_json, keys=_KEYS),
    )


def _parse(data: bytes) -> None:
    header = parse_body(data, path=Path(HEADER_NAME))
    if any(Path(file.name).name != file.name for file in header.files):
        raise AssertionError("a file outside of the folder was accepted")


def _body() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_header(Path(folder), _HEADER, sealer=make_identity())
        content = (Path(folder) / HEADER_NAME).read_bytes()
    return content[len(MAGIC) + SIGNATURE_BYTES :]
