"""GGUF files: header, tensors, the model's configuration and its vocabulary."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from random import Random

from core.errors import PenstockError
from core.models.registry import load_config
from core.tokens.gguf_vocabulary import read_gguf_vocabulary
from core.tokens.tokenizer import Tokenizer
from core.weights.gguf import GgufCheckpoint
from tests.core.weights.gguf_bytes import GgufBytes, array, key_value, string, tensor
from tests.fuzz.damage import any_damage, odd_number
from tests.fuzz.scratch import fresh_file
from tests.fuzz.target import FuzzTarget
from tests.support.models import TinyModel, write_gguf

_TINY = TinyModel(
    num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, vocab_size=32
)


def make_target() -> FuzzTarget:
    return FuzzTarget(
        try_input=_open_and_read,
        refusals=(PenstockError,),
        seeds=[GgufBytes().to_bytes(), _tiny_model(_TINY), *_vocabularies()],
        mutate=_mutate,
    )


def _open_and_read(data: bytes) -> None:
    checkpoint = GgufCheckpoint(fresh_file(data, suffix=".gguf"))
    try:
        for key in checkpoint.metadata:
            checkpoint.metadata[key]
        _read_tensors(checkpoint)
        for read in (_read_vocabulary, load_config):
            try:
                read(checkpoint)
            except PenstockError:
                continue
    finally:
        checkpoint.close()


def _read_tensors(checkpoint: GgufCheckpoint) -> None:
    for name in checkpoint.tensor_names:
        rows = checkpoint.shape(name)[0]
        try:
            if checkpoint.read(name).shape != checkpoint.shape(name):
                raise AssertionError(f"{name!r} is not of the shape it says")
            if len(checkpoint.shape(name)) == 2:
                checkpoint.read_rows(name, first=rows - 1, count=1)
            if checkpoint.has_nibbles(name):
                checkpoint.read_nibbles(name, first=0, count=rows)
        except PenstockError:  # values that are no numbers, say; the others can still be read
            continue


def _read_vocabulary(checkpoint: GgufCheckpoint) -> None:
    Tokenizer(read_gguf_vocabulary(checkpoint.metadata)).encode("hello w")


def _tiny_model(model: TinyModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "tiny.gguf", model).read_bytes()


def _vocabularies() -> list[bytes]:
    """Headers with no tensors, with a vocabulary of either kind."""
    tokens = ["<unk>", "<s>", "</s>", "h", "e", "l", "he", "▁"]
    shared = [
        array("tokenizer.ggml.tokens", _STRING, len(tokens), b"".join(map(string, tokens))),
        array("tokenizer.ggml.token_type", 5, len(tokens), struct.pack("<8i", 2, 3, 3, *[1] * 5)),
        key_value("tokenizer.ggml.bos_token_id", _U32, struct.pack("<I", 1)),
        key_value("tokenizer.ggml.eos_token_id", _U32, struct.pack("<I", 2)),
        key_value("tokenizer.chat_template", _STRING, string("{{ messages[0].content }}")),
    ]
    byte_pairs = [
        key_value("tokenizer.ggml.model", _STRING, string("gpt2")),
        key_value("tokenizer.ggml.pre", _STRING, string("llama-bpe")),
        array("tokenizer.ggml.merges", _STRING, 1, string("h e")),
    ]
    sentence_piece = [
        key_value("tokenizer.ggml.model", _STRING, string("llama")),
        array("tokenizer.ggml.scores", 6, len(tokens), struct.pack("<8f", *range(8))),
        key_value("tokenizer.ggml.unknown_token_id", _U32, struct.pack("<I", 0)),
    ]
    return [
        GgufBytes(key_values=shared + kind, tensors=[], data=b"").to_bytes()
        for kind in (byte_pairs, sentence_piece)
    ]


_U32, _STRING = 4, 8
_KEYS = (
    "general.alignment",
    "general.architecture",
    "llama.block_count",
    "llama.embedding_length",
    "llama.attention.head_count",
    "llama.rope.scaling.type",
    "split.count",
    "tokenizer.chat_template",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.unknown_token_id",
)
_TEXTS = ("", "llama", "gpt2", "qwen2", "default", "h e", "$A", " ", "\0", "<0x0A>", "hello" * 50)


def _mutate(data: bytes, random: Random) -> bytes:
    kind = random.randrange(10)
    if kind == 0:
        return _new_file(random)
    if kind <= 3:
        return _add_key_value(data, random)
    return any_damage(data, random)


def _new_file(random: Random) -> bytes:
    return GgufBytes(
        version=random.choice((2, 3, 3, odd_number(random) % (1 << 32))),
        key_values=[_key_value(random) for _ in range(random.randrange(4))],
        tensors=[_tensor(random, number) for number in range(random.randrange(4))],
        data=random.randbytes(random.choice((0, 64, 256, 1024))),
    ).to_bytes()


def _add_key_value(data: bytes, random: Random) -> bytes:
    """Puts another key-value before the first, and counts it."""
    if len(data) < 24:
        return data
    count = int.from_bytes(data[16:24], "little") + 1
    return data[:16] + (count % (1 << 64)).to_bytes(8, "little") + _key_value(random) + data[24:]


def _key_value(random: Random) -> bytes:
    key, kind = random.choice(_KEYS), random.randrange(14)
    if kind == _STRING:
        return key_value(key, kind, string(random.choice(_TEXTS)))
    if kind == 9:
        return _array(key, random)
    number = odd_number(random) % (1 << 64)
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}
    return key_value(key, kind, number.to_bytes(8, "little")[: sizes.get(kind, 4)])


def _array(key: str, random: Random) -> bytes:
    count = random.choice((0, 1, 3, 8))
    if random.random() < 0.5:
        return array(
            key, _STRING, count, b"".join(string(random.choice(_TEXTS)) for _ in range(count))
        )
    claimed = random.choice((count, count, odd_number(random) % (1 << 64)))
    return array(key, random.randrange(13), claimed, random.randbytes(8 * count))


def _tensor(random: Random, number: int) -> bytes:
    dimensions = [
        random.choice((1, 2, 32, 256, odd_number(random) % (1 << 64)))
        for _ in range(random.randint(1, 4))
    ]
    offset = random.choice((0, 32 * number, odd_number(random) % (1 << 64)))
    return tensor(f"t{number}", dimensions, block_type=random.randrange(42), offset=offset)
