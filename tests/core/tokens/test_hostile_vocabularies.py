"""Tokenizer files that were made to harm: refused with an error of ours, at no great cost."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.errors import CorruptWeights, InvalidInput
from core.tokens.chat_template import ChatMessage
from core.tokens.gguf_vocabulary import read_gguf_vocabulary
from core.tokens.tokenizer import Tokenizer, load_tokenizer
from core.tokens.vocabulary import MAX_CHAT_TEMPLATE_CHARS
from tests.core.tokens.test_tokenizer import sentence_piece_metadata
from tests.support.tiny_tokenizer import write_tiny_tokenizer

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "settings",
    [
        b"[" * 100_000,
        b'{"a": NaN, "a": 1}',
        b"\xff",
        b"[]",
        b'{"eos_token": "\\ud800"}',
        b'{"bos_token": {"content": "\\ud800"}}',
        b'{"chat_template": "' + b"x" * (MAX_CHAT_TEMPLATE_CHARS + 1) + b'"}',
    ],
)
def test_hostile_settings_are_refused(tmp_path: Path, settings: bytes) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_bytes(settings)
    with pytest.raises(CorruptWeights):
        load_tokenizer(folder)


@pytest.mark.parametrize("templates", [["no object"], [{"name": [], "template": 7}], [None], {}])
def test_templates_that_are_none_are_no_templates(tmp_path: Path, templates: Any) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    change(folder / "tokenizer_config.json", chat_template=templates)
    assert not load_tokenizer(folder).has_chat_template


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (4 * MAX_CHAT_TEMPLATE_CHARS + 10)])
def test_a_hostile_template_file_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CorruptWeights):
        load_tokenizer(folder)


def test_a_token_id_far_beyond_the_others_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["x"] = 2**32 - 1  # a table of that length would take 32 GiB
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CorruptWeights, match="4294967295"):
        load_tokenizer(folder)


def test_a_tokenizer_that_lacks_its_own_unknown_token_says_so(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["h"]
    content["model"] |= {"unk_token": "<nowhere>", "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(CorruptWeights, match="nowhere"):
        tokenizer.encode("h")


def tokenizer_with(pattern: str, folder: Path) -> Tokenizer:
    """One that splits texts by a regular expression."""
    write_tiny_tokenizer(folder)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    change(folder / "tokenizer.json", pre_tokenizer=split | {"invert": False})
    return load_tokenizer(folder)


def test_a_pattern_that_takes_too_many_steps_fails_as_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("(h+)+$", tmp_path)
    with pytest.raises(CorruptWeights, match="retry-limit"):
        tokenizer.encode("h" * 30 + "e")


def test_a_pattern_that_takes_long_lets_other_threads_run(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("(?:h|hh)+c", tmp_path)
    encoding = threading.Thread(target=tokenizer.encode, args=(("h" * 28 + "e") * 4,))
    encoding.start()
    num_turns = 0
    while encoding.is_alive():
        num_turns += 1
        encoding.join(0.001)
    assert num_turns > 10


def test_a_template_that_writes_half_a_character_fails_as_a_template(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template="{{ '\\ud800' }}")
    tokenizer = load_tokenizer(folder)
    try:
        with pytest.raises(InvalidInput, match="UnicodeEncodeError"):
            tokenizer.encode_chat([ChatMessage("user", "hello")], now=NOON)
    finally:
        tokenizer.close()


@pytest.mark.parametrize("token", ["$A", "<s:", "<s>:1", "a b", "$"])
def test_a_first_token_with_any_text_is_that_token(token: str) -> None:
    metadata = sentence_piece_metadata()
    metadata["tokenizer.ggml.tokens"][1] = token
    assert Tokenizer(read_gguf_vocabulary(metadata)).encode("hello") == [1, 268]


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(CorruptWeights, match="template"):
        read_gguf_vocabulary(sentence_piece_metadata() | {"tokenizer.chat_template": 7})
