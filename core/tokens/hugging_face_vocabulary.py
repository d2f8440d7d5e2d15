"""The tokenizer of a Hugging Face folder: tokenizer.json and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from core.errors import CorruptWeights, NotFound
from core.tokens.vocabulary import MAX_CHAT_TEMPLATE_CHARS, Vocabulary, put_before_texts
from core.weights.safetensors import read_json

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_hugging_face_vocabulary(folder: Path) -> Vocabulary:
    """Reads a folder; raises NotFound without tokenizer.json, CorruptWeights when damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFound(f"{path} does not exist; the model's tokenizer is wanted there")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptWeights(f"{path} is not a tokenizer: {error}") from None
    # Limits of training runs, which would silently cut prompts short.
    backend.no_truncation()
    backend.no_padding()
    settings = _read_json(folder / "tokenizer_config.json")
    named = _named_tokens(settings)
    _add_bos(backend, settings, named)
    return Vocabulary(
        backend=backend,
        eos_token_ids=_end_token_ids(folder, backend, named),
        chat_template=_chat_template(folder, settings),
        named_tokens=named,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """An absent file is an empty object."""
    return read_json(path) if path.is_file() else {}


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Tokens are written as text or as an object with `content`."""
    named = {}
    for name in _NAMED_TOKENS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            named[name] = _require_text(text, name)
    return named


def _require_text(text: str, name: str) -> str:
    """JSON can write half of a surrogate pair, which no text has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorruptWeights(f"the tokenizer's {name} is {text!r}, which is no text") from None
    return text


def _add_bos(backend: Backend, settings: dict[str, Any], named: dict[str, str]) -> None:
    """Some folders ask for a BOS in their settings that tokenizer.json does not add."""
    bos = named.get("bos_token", "")
    token_id = backend.token_to_id(bos)
    if (
        settings.get("add_bos_token") is True
        and token_id is not None
        and not backend.encode("").ids
    ):
        put_before_texts(backend, bos, token_id)


def _end_token_ids(folder: Path, backend: Backend, named: dict[str, str]) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if isinstance(ids, list) and ids and all(isinstance(item, int) for item in ids):
            return tuple(ids)
    token_id = backend.token_to_id(named.get("eos_token", ""))
    return () if token_id is None else (token_id,)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the settings' template (of a list, the one named "default")."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_template(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict))
        found = (entry.get("template") for entry in named if entry.get("name") == "default")
        template = next(found, None)
    return template if isinstance(template, str) else None


def _read_template(path: Path) -> str:
    # Of a character's four bytes; one that is longer is refused by its length.
    with path.open("rb") as file:
        content = file.read(4 * MAX_CHAT_TEMPLATE_CHARS + 4)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise CorruptWeights(f"{path} is not UTF-8") from None
