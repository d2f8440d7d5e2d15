"""The vocabulary inside a GGUF file.

`tokenizer.ggml.model` says which of two kinds it is: "gpt2" merges bytes by a
list of merges, "llama" is SentencePiece's BPE, which merges by score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from core.errors import CorruptWeights
from core.tokens.pre_tokenizers import pre_tokenization
from core.tokens.sentence_piece import sentence_piece_backend
from core.tokens.vocabulary import Vocabulary, put_before_texts

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_KEY = "tokenizer.ggml."


def read_gguf_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Builds the vocabulary from a GGUF file's key-values.

    Raises CorruptWeights when they are missing, contradict each other or are of a kind
    that is not supported.
    """
    tokens = _tokens(metadata)
    kinds = [int(kind) for kind in _numbers(metadata, "token_type", "iu", [_NORMAL] * len(tokens))]
    if len(kinds) != len(tokens):
        raise CorruptWeights(f"the vocabulary has {len(tokens)} tokens and {len(kinds)} types")
    model = metadata.get(_KEY + "model")
    if model == "gpt2":
        backend, adds_bos = _byte_pair_backend(metadata, tokens)
    elif model == "llama":
        backend, adds_bos = _sentence_piece_backend(metadata, tokens, kinds), True
    else:
        raise CorruptWeights(f"a vocabulary of kind {model!r} is not supported")
    backend.add_tokens(_added(tokens, kinds, _USER_DEFINED, special=False))
    backend.add_special_tokens(_added(tokens, kinds, _CONTROL, special=True))
    backend.add_special_tokens(_added(tokens, kinds, _UNKNOWN, special=True))
    bos = _named_token_id(metadata, "bos", tokens)
    if bos is not None and _flag(metadata, "add_bos_token", adds_bos):
        put_before_texts(backend, tokens[bos], bos)
    return Vocabulary(
        backend=backend,
        eos_token_ids=_end_token_ids(metadata, tokens),
        chat_template=_chat_template(metadata),
        named_tokens=_named_tokens(metadata, tokens),
    )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get(_KEY + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CorruptWeights("the file has no vocabulary")
    return tokens


def _numbers(
    metadata: Mapping[str, Any], name: str, dtype_kinds: str, default: list[int] | None = None
) -> Any:
    """An array of numbers whose dtype is of these kinds."""
    numbers = metadata.get(_KEY + name)
    if numbers is None:
        return default
    if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in dtype_kinds:
        raise CorruptWeights(f"the vocabulary's {name} is no array of such numbers")
    return numbers


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    flag = metadata.get(_KEY + name, default)
    if not isinstance(flag, bool):
        raise CorruptWeights(f"the vocabulary's {name} is neither true nor false")
    return flag


def _chat_template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CorruptWeights("the file's chat template is no text")
    return template


def _byte_pair_backend(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    kind, lines = metadata.get(_KEY + "pre", "default"), metadata.get(_KEY + "merges", [])
    if not isinstance(kind, str) or not isinstance(lines, list):
        raise CorruptWeights("the vocabulary's pre-tokenizer or its merges are no text")
    steps = pre_tokenization(kind)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [_merge(line) for line in lines]
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=steps.ignores_merges)
    except Exception as error:  # the library raises nothing narrower
        raise CorruptWeights(f"the vocabulary's merges do not fit its tokens: {error}") from None
    backend = Backend(model)
    backend.pre_tokenizer = steps.pre_tokenizer
    if steps.normalizer is not None:
        backend.normalizer = steps.normalizer
    backend.decoder = decoders.ByteLevel()
    return backend, steps.adds_bos


def _merge(line: str) -> tuple[str, str]:
    # Byte-level tokens hold no space, added ones do not merge: the first inner space divides.
    left, _, right = line.partition(" ")
    if not left or not right:
        raise CorruptWeights(f"the vocabulary has the malformed merge {line!r}")
    return left, right


def _sentence_piece_backend(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> Backend:
    scores = _numbers(metadata, "scores", "fiu")
    if scores is None or len(scores) != len(tokens):
        raise CorruptWeights("the SentencePiece vocabulary has no score for each token")
    unknown = _named_token_id(metadata, "unknown", tokens)
    return sentence_piece_backend(
        tokens,
        [float(score) for score in scores],
        mergeable=[kind in (_NORMAL, _USER_DEFINED) for kind in kinds],
        unknown_token=None if unknown is None else tokens[unknown],
        adds_space=_flag(metadata, "add_space_prefix", True),
    )


def _added(tokens: list[str], kinds: list[int], kind: int, *, special: bool) -> list[AddedToken]:
    chosen = (token for token, seen in zip(tokens, kinds, strict=True) if seen == kind and token)
    return [AddedToken(token, normalized=False, special=special) for token in chosen]


def _named_token_id(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    token_id = metadata.get(f"{_KEY}{name}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise CorruptWeights(f"the {name} token {token_id!r} is not among {len(tokens)} tokens")
    return token_id


def _named_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    keys = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: _named_token_id(metadata, key, tokens) for key, name in keys.items()}
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def _end_token_ids(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[int, ...]:
    """End of sequence, of turn and of message, without repetition."""
    ids: Iterable[int | None] = (
        _named_token_id(metadata, name, tokens) for name in ("eos", "eot", "eom")
    )
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
