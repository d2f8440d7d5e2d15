"""Tokenizers of Hugging Face folders: tokenizer.json and the files beside it."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from random import Random

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from core.errors import PenstockError
from core.tokens.hugging_face_vocabulary import read_hugging_face_vocabulary
from core.tokens.tokenizer import Tokenizer
from tests.fuzz.damage import any_damage
from tests.fuzz.json_damage import damage_json
from tests.fuzz.scratch import fresh_folder
from tests.fuzz.sections import damage_one, join, split
from tests.fuzz.target import FuzzTarget
from tests.support.tiny_tokenizer import CHAT_TEMPLATE

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
_SETTINGS = {
    "add_bos_token": True,
    "bos_token": {"content": "<s>"},
    "eos_token": "</s>",
    "chat_template": [{"name": "default", "template": CHAT_TEMPLATE}],
}
_KEYS = ("chat_template", "bos_token", "eos_token_id", "add_bos_token", "special", "normalizer")


def make_target() -> FuzzTarget:
    others = [json.dumps(_SETTINGS).encode(), b'{"eos_token_id": [1, 2]}', CHAT_TEMPLATE.encode()]
    return FuzzTarget(
        try_input=_load_and_use,
        refusals=(PenstockError,),
        seeds=[join([backend, *others]) for backend in (_byte_level(), _sentence_piece())],
        mutate=partial(damage_one, damages=(_damage_json, _damage_json, _damage_json, any_damage)),
    )


def _load_and_use(data: bytes) -> None:
    folder = fresh_folder()
    for name, content in zip(_FILES, split(data, len(_FILES)), strict=True):
        if content:
            (folder / name).write_bytes(content)
    tokenizer = Tokenizer(read_hugging_face_vocabulary(folder))
    ids = tokenizer.encode("hello w<|end|>\0 ü")
    tokenizer.decode(ids, skip_special_tokens=True)


def _byte_level() -> bytes:
    tokens = ["<s>", "</s>", *"helowĠ", "he", "ll"]
    backend = Backend(_byte_pairs(tokens, [("h", "e"), ("l", "l")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return _saved(backend)


def _sentence_piece() -> bytes:
    tokens = ["<unk>", "<s>", "</s>", "▁", "h", "e", "he", "<0x0A>"]
    backend = Backend(_byte_pairs(tokens, [("h", "e")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return _saved(backend)


def _byte_pairs(tokens: list[str], merges: list[tuple[str, str]], **options: object) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return models.BPE(vocab=vocabulary, merges=merges, **options)


def _saved(backend: Backend) -> bytes:
    backend.add_special_tokens(["<s>", "</s>", "<|end|>"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        backend.save(str(path))
        return path.read_bytes()


def _damage_json(text: bytes, random: Random) -> bytes:
    return damage_json(text, random, keys=_KEYS)
