"""A small header of a sealed model, and what its sealer signs of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from core.weights.sealed.header import (
    HEADER_NAME,
    MAGIC,
    SIGNATURE_BYTES,
    Holder,
    SealedFile,
    SealedTensor,
    SealHeader,
    write_header,
)
from core.weights.sealed.identity import make_identity

HEADER = SealHeader(
    model="m",
    version="1",
    seal_id="0" * 32,
    format="gguf",
    files=(
        SealedFile(
            name="m.gguf",
            prefix_bytes=10,
            prefix_sha256="a" * 64,
            tensors=(SealedTensor(name="t", size_bytes=5, part="layer-0"),),
        ),
    ),
    companions={"tokenizer.json": "b" * 64},
    holders={"owner": Holder(opening_key=bytes(32), wraps={"layer-0": bytes(80)})},
)


def header_body() -> bytes:
    """HEADER as `parse_body` reads it, once the signature before it has been found right."""
    with tempfile.TemporaryDirectory() as folder:
        write_header(Path(folder), HEADER, sealer=make_identity())
        content = (Path(folder) / HEADER_NAME).read_bytes()
    return content[len(MAGIC) + SIGNATURE_BYTES :]
