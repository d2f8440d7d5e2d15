"""How the byte-level vocabularies of GGUF files cut a text before merging bytes.

The names are those of `tokenizer.ggml.pre`; the patterns are those of the
models' own tokenizer.json files, to which llama.cpp's agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from core.errors import CorruptWeights

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _CONTRACTIONS + _WORDS_AND_SPACES % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + _WORDS_AND_SPACES % r"\p{N}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True, kw_only=True)
class PreTokenization:
    """What happens to a text before byte pairs are merged.

    `ignores_merges`: a piece that is a token as a whole is taken as it is.
    """

    pre_tokenizer: PreTokenizer
    normalizer: Normalizer | None = None
    ignores_merges: bool = False
    adds_bos: bool = False  # where the file does not say


def pre_tokenization(kind: str) -> PreTokenization:
    """Builds the steps that `tokenizer.ggml.pre` names; raises CorruptWeights for unknown kinds."""
    if kind in ("smollm", "starcoder", "refact", "command-r", "codeshell"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return PreTokenization(pre_tokenizer=pre_tokenizers.Sequence([digits, byte_level]))
    if kind in ("qwen2", "deepseek-r1-qwen"):
        return PreTokenization(pre_tokenizer=_split(_QWEN2), normalizer=normalizers.NFC())
    if kind == "stablelm2":
        return PreTokenization(pre_tokenizer=_split(_QWEN2))
    if kind in ("llama-bpe", "llama3", "llama-v3", "falcon3"):
        steps = _split(_LLAMA3)
        return PreTokenization(pre_tokenizer=steps, ignores_merges=True, adds_bos=True)
    if kind in ("smaug-bpe", "dbrx"):
        return PreTokenization(pre_tokenizer=_split(_LLAMA3))
    if kind == "tekken":
        return PreTokenization(pre_tokenizer=_split(_TEKKEN), ignores_merges=True, adds_bos=True)
    if kind in ("gpt-2", "gpt2", "mpt", "olmo", "jais"):
        return PreTokenization(pre_tokenizer=_split(_GPT2))
    if kind == "default":
        return PreTokenization(pre_tokenizer=_split(*_DEFAULT))
    raise CorruptWeights(f"the vocabulary's pre-tokenizer {kind!r} is not supported")


def _split(*patterns: str) -> PreTokenizer:
    """Cuts by each pattern in turn, then maps bytes to their printable stand-ins."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, byte_level])
