"""llama2.c's files: the weights, and the tokenizer.bin beside them."""

from __future__ import annotations

import struct
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

from core.errors import PenstockError
from core.models.registry import load_config
from core.tokens.llama2c_vocabulary import read_llama2c_vocabulary
from core.tokens.tokenizer import Tokenizer
from core.weights.llama2c import Llama2cCheckpoint
from tests.fuzz.damage import any_damage
from tests.fuzz.scratch import fresh_folder
from tests.fuzz.sections import damage_one, join, split
from tests.fuzz.target import FuzzTarget
from tests.support.models import TinyModel, write_llama2c


def make_target() -> FuzzTarget:
    sizes = {"num_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    models = [
        TinyModel(**sizes, head_dim=4, vocab_size=8, context_length=4, tied_head=tied_head)
        for tied_head in (True, False)
    ]
    return FuzzTarget(
        try_input=_open_and_read,
        refusals=(PenstockError,),
        seeds=[join([_weights(model), _vocabulary()]) for model in models],
        mutate=partial(damage_one, damages=(any_damage, any_damage)),
    )


def _open_and_read(data: bytes) -> None:
    folder = fresh_folder()
    weights, vocabulary = split(data, 2)
    (folder / "model.bin").write_bytes(weights)
    (folder / "tokenizer.bin").write_bytes(vocabulary)
    with suppress(PenstockError):  # the weights are another file
        Tokenizer(read_llama2c_vocabulary(folder / "tokenizer.bin")).encode("hello w")
    checkpoint = Llama2cCheckpoint(folder / "model.bin")
    try:
        load_config(checkpoint)
        for name in checkpoint.tensor_names:
            checkpoint.read(name)
            checkpoint.read_rows(name, first=0, count=1)
    finally:
        checkpoint.close()


def _weights(model: TinyModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return _written(Path(folder) / "model.bin", model)


def _written(path: Path, model: TinyModel) -> bytes:
    return write_llama2c(path, model).read_bytes()


def _vocabulary() -> bytes:
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [b" ", b"h", b"e", b"he", "ü".encode()]
    entries = [
        struct.pack("<fi", -number, len(piece)) + piece for number, piece in enumerate(pieces)
    ]
    return struct.pack("<i", 6) + b"".join(entries)
