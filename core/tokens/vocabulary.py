"""What every tokenizer file comes down to, whatever its format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer as Backend
from tokenizers import processors

from core.errors import CorruptWeights

MAX_CHAT_TEMPLATE_CHARS = 256 * 1024
# Of ids below the greatest. Tables are as long as the greatest, which a file can choose freely.
_MOST_UNUSED_IDS = 1 << 16
SPACE_MARK = "▁"  # what SentencePiece writes for a space


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer of the `tokenizers` library and what the library does not hold.

    `named_tokens` ("bos_token", "eos_token", ...) are offered to the chat template.
    """

    backend: Backend
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    named_tokens: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.chat_template or "")
        if size > MAX_CHAT_TEMPLATE_CHARS:
            raise CorruptWeights(
                f"the chat template has {size} characters; allowed: {MAX_CHAT_TEMPLATE_CHARS}"
            )


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """The bytes that each token id adds to a text.

    `strips_leading_space`: the tokenizer puts a space before every text, and
    decoding takes it away again. `text_bytes` has nothing for special tokens.
    """

    all_bytes: tuple[bytes, ...]
    text_bytes: tuple[bytes, ...]
    strips_leading_space: bool


def token_bytes(backend: Backend) -> TokenBytes:
    """Tabulates a backend's decoder; raises CorruptWeights for kinds that are not tables."""
    if backend.decoder is None:
        raise CorruptWeights("the tokenizer has no decoder")
    steps = _decoder_steps(json.loads(backend.decoder.__getstate__()))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        to_bytes, strips = _byte_level_bytes, False
    elif kinds & {"Replace", "Metaspace"}:
        to_bytes, strips = _sentence_piece_bytes, any(map(_strips_leading_space, steps))
    else:
        raise CorruptWeights(f"the tokenizer's decoder {sorted(kinds)} is not supported")
    tokens = backend.get_vocab(with_added_tokens=True)
    size = max(tokens.values(), default=-1) + 1
    if size > len(tokens) + _MOST_UNUSED_IDS:
        raise CorruptWeights(f"the vocabulary has {len(tokens)} tokens, and one with id {size - 1}")
    table = [b""] * size
    for token, token_id in tokens.items():
        table[token_id] = to_bytes(token)
    special = special_token_ids(backend).values()
    hidden = frozenset(special)
    return TokenBytes(
        all_bytes=tuple(table),
        text_bytes=tuple(b"" if i in hidden else data for i, data in enumerate(table)),
        strips_leading_space=strips,
    )


def put_before_texts(backend: Backend, token: str, token_id: int) -> None:
    """Has the backend begin every text with a token."""
    # A name of ours in the template: of a token's own text "$" and ":" would be taken as syntax.
    begin = {"id": "begin", "ids": [token_id], "tokens": [token]}
    backend.post_processor = processors.TemplateProcessing(
        single="begin $A", special_tokens=[begin]
    )


def special_token_ids(backend: Backend) -> dict[str, int]:
    """The control tokens, by their text."""
    added = backend.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}


def _decoder_steps(decoder: dict) -> list[dict]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for child in decoder["decoders"] for step in _decoder_steps(child)]


def _strips_leading_space(step: dict) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


def _sentence_piece_bytes(token: str) -> bytes:
    byte = byte_of_fallback_token(token)
    if byte is not None:
        return bytes([byte])
    return token.replace(SPACE_MARK, " ").encode()


def byte_of_fallback_token(token: str) -> int | None:
    """The byte of a fallback token such as "<0x0A>"; None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None
