"""Text to token ids and back, for every tokenizer file that we read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from core.errors import CorruptWeights, InvalidInput
from core.tokens.chat_template import ROLES, ChatMessage, ChatTemplate, ChatTemplateLimits
from core.tokens.detokenizer import Detokenizer
from core.tokens.gguf_vocabulary import read_gguf_vocabulary
from core.tokens.hugging_face_vocabulary import read_hugging_face_vocabulary
from core.tokens.llama2c_vocabulary import read_llama2c_vocabulary
from core.tokens.vocabulary import Vocabulary, special_token_ids, token_bytes
from core.weights.open import open_checkpoint
from core.weights.sealed.identity import SealKeys
from core.weights.sealed.opening import is_sealed

# A noncharacter (Unicode 15, section 23.7), so in no real text.
_BREAK = "\ufdd0"
# What the library raises where a regular expression takes too many steps, say. It has no name that
# could be imported, and is no Exception.
_PANIC = "PanicException"
_EPOCH = datetime.fromtimestamp(0, UTC)


class Tokenizer:
    """One model's tokenizer. Thread-safe; `encode` of long texts takes milliseconds."""

    def __init__(
        self, vocabulary: Vocabulary, *, template_limits: ChatTemplateLimits | None = None
    ) -> None:
        self._backend = vocabulary.backend
        self._bytes = token_bytes(vocabulary.backend)
        self._special = special_token_ids(vocabulary.backend)
        self._template: ChatTemplate | None = None
        if vocabulary.chat_template:
            self._template = ChatTemplate(
                vocabulary.chat_template, vocabulary.named_tokens, limits=template_limits
            )
        self.eos_token_ids = vocabulary.eos_token_ids
        self.vocab_size = len(self._bytes.all_bytes)
        self.longest_token_bytes = max(map(len, self._bytes.all_bytes), default=0)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Tokenises a text as it is.

        The text of a special token becomes that token: whoever writes a raw prompt
        speaks for every role. `add_bos`: with what the model wants before a text. Raises
        CorruptWeights where the tokenizer's own parts do not fit, which may show only here.
        """
        return _encode(self._backend, text, add_bos=add_bos)

    def encode_chat(self, messages: Sequence[ChatMessage], *, now: datetime = _EPOCH) -> list[int]:
        """Puts messages through the chat template and tokenises the result.

        The text of a special token inside a message stays text, so that no one can
        speak for another role. `now` is for templates that tell the date. Raises
        InvalidInput: no template, no messages, an unknown role, or the template refuses.
        """
        if self._template is None:
            raise InvalidInput("messages", [m.role for m in messages], "prompt: no chat template")
        _check_messages(messages)
        pattern = self._special_pattern
        if not any(pattern.search(message.content) for message in messages):
            text = self._template.render(messages, now=now)
            return _encode(self._backend, text, add_bos=False)
        broken = [
            ChatMessage(message.role, pattern.sub(rf"\g<0>{_BREAK}", message.content))
            for message in messages
        ]
        text = self._template.render(broken, now=now)
        return _encode(self._break_removing_backend, text, add_bos=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Ids out of range add nothing."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(
        self, *, skip_special_tokens: bool = False, continues_text: bool = False
    ) -> Detokenizer:
        """Starts to decode a sequence piece by piece.

        `continues_text`: the ids go on from a text, so that a first token's space is kept.
        """
        table = self._bytes.text_bytes if skip_special_tokens else self._bytes.all_bytes
        strips = self._bytes.strips_leading_space and not continues_text
        return Detokenizer(table, strips_leading_space=strips)

    def prepare_chat(self) -> None:
        """Starts the chat template's process, so that the first conversation need not wait."""
        if self._template is not None:
            self._template.start()

    def close(self) -> None:
        """Ends the chat template's process."""
        if self._template is not None:
            self._template.close()

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Matches the first character of a special token's text, wherever one begins."""
        texts = sorted((text for text in self._special if len(text) > 1), key=len, reverse=True)
        alternatives = "|".join(map(re.escape, texts)) or "(?!)"
        return re.compile(rf"(?s)(?={alternatives}).")

    @cached_property
    def _break_removing_backend(self) -> Backend:
        """A copy that finds special tokens first and removes breaks afterwards.

        Special tokens are sought in the raw text, before normalisation, so that a broken one
        is not found; the normaliser then makes the text whole again.
        """
        content = json.loads(self._backend.to_str())
        for token in content["added_tokens"]:
            if token["special"]:
                token["normalized"] = False
        remove = {"type": "Replace", "pattern": {"String": _BREAK}, "content": ""}
        steps = [remove, content["normalizer"]] if content["normalizer"] else [remove]
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        return Backend.from_str(json.dumps(content))


def _encode(backend: Backend, text: str, *, add_bos: bool) -> list[int]:
    try:
        # Unlike `encode`, a batch lets other Python threads run meanwhile.
        return backend.encode_batch_fast([text], add_special_tokens=add_bos)[0].ids
    except BaseException as error:  # the library raises nothing narrower
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise CorruptWeights(f"the model's tokenizer fails: {error}") from None


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    if not messages:
        raise InvalidInput("messages", [], "at least one message")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidInput(
                f"messages[{index}].role", message.role, f"one of {', '.join(ROLES)}"
            )


def load_tokenizer(path: Path, *, keys: SealKeys | None = None) -> Tokenizer:
    """Loads the tokenizer that belongs to a model: a GGUF file, a Hugging Face folder, a llama2.c
    .bin with its tokenizer.bin beside it, or with `keys` a sealed one. Raises NotFound,
    CorruptWeights or InvalidInput, as `open_checkpoint` does.
    """
    if keys is None and (path / "tokenizer.json").is_file() and not is_sealed(path):
        return Tokenizer(read_hugging_face_vocabulary(path))
    checkpoint = open_checkpoint(path, keys=keys)
    try:
        if checkpoint.format == "llama2c":
            return Tokenizer(read_llama2c_vocabulary(checkpoint.path.with_name("tokenizer.bin")))
        if checkpoint.format == "safetensors":
            return Tokenizer(read_hugging_face_vocabulary(path))
        return Tokenizer(read_gguf_vocabulary(checkpoint.metadata))
    finally:
        checkpoint.close()
