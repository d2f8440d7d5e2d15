"""SentencePiece's BPE rebuilt on the `tokenizers` library.

SentencePiece joins, again and again, the neighbours whose joint token has the
best score (Kudo and Richardson 2018). That is BPE with merges ranked by the
score of what they make; bytes that no token covers become "<0x..>" tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from core.errors import CorruptWeights
from core.tokens.vocabulary import SPACE_MARK

# Every way to cut a token in two is tried: time and memory grow with the square of its length.
_MAX_TOKEN_CHARS = 1024


def sentence_piece_backend(
    tokens: Sequence[str],
    scores: Sequence[float],
    *,
    mergeable: Sequence[bool],
    unknown_token: str | None,
    adds_space: bool,
) -> Backend:
    """Builds a backend from tokens and scores of equal length.

    `mergeable[id]`: the token can be made by merging (control and byte tokens cannot).
    `adds_space`: a space is put before every text. Raises CorruptWeights.
    """
    longest = max(map(len, tokens), default=0)
    if longest > _MAX_TOKEN_CHARS:
        raise CorruptWeights(
            f"the vocabulary has a token of {longest} characters; allowed: {_MAX_TOKEN_CHARS}"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(tokens, scores, mergeable),
            unk_token=unknown_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # the library raises nothing narrower
        raise CorruptWeights(f"the SentencePiece vocabulary is damaged: {error}") from None
    backend = Backend(model)
    marks = normalizers.Replace(" ", SPACE_MARK)
    prefix = [normalizers.Prepend(SPACE_MARK)] if adds_space else []
    backend.normalizer = normalizers.Sequence([*prefix, marks])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(
    tokens: Sequence[str], scores: Sequence[float], mergeable: Sequence[bool]
) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first."""
    parts = {token for token, usable in zip(tokens, mergeable, strict=True) if usable}
    found: list[tuple[float, int, str, str]] = []
    for token_id, token in enumerate(tokens):
        if mergeable[token_id]:
            found.extend(
                (-scores[token_id], token_id, token[:cut], token[cut:])
                for cut in range(1, len(token))
                if token[:cut] in parts and token[cut:] in parts
            )
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]
