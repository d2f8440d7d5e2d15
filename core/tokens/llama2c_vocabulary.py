"""The tokenizer.bin of llama2.c: scores and pieces of a SentencePiece vocabulary.

Layout, little-endian: int32 longest piece in bytes, then for each token float32
score, int32 length, bytes. Spaces are written as spaces; byte tokens either as
"<0x0A>" or, by older writers, as the byte itself. Ids 0, 1 and 2 are unknown,
begin and end; 3 to 258 are the bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tokenizers import AddedToken, processors

from core.errors import CorruptWeights, NotFound
from core.tokens.sentence_piece import sentence_piece_backend
from core.tokens.vocabulary import SPACE_MARK, Vocabulary

_HEADER = struct.Struct("<i")
_ENTRY = struct.Struct("<fi")
_SPECIAL = ("<unk>", "<s>", "</s>")
_FIRST_BYTE_ID, _END_BYTE_ID = 3, 259


def read_llama2c_vocabulary(path: Path) -> Vocabulary:
    """Reads a tokenizer.bin; raises NotFound or CorruptWeights."""
    if not path.is_file():
        raise NotFound(f"{path} does not exist; a llama2.c model needs its tokenizer.bin beside it")
    pieces, scores = _read_pieces(path.read_bytes(), path)
    if len(pieces) < _END_BYTE_ID:
        raise CorruptWeights(f"{path} has {len(pieces)} tokens; at least {_END_BYTE_ID} wanted")
    tokens = [_token(index, piece) for index, piece in enumerate(pieces)]
    backend = sentence_piece_backend(
        tokens,
        scores,
        mergeable=[index >= _END_BYTE_ID for index in range(len(tokens))],
        unknown_token=_SPECIAL[0],
        adds_space=True,
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in _SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return Vocabulary(backend=backend, eos_token_ids=(2,), named_tokens=named)


def _read_pieces(data: bytes, path: Path) -> tuple[list[bytes], list[float]]:
    pieces: list[bytes] = []
    scores: list[float] = []
    position = _HEADER.size
    while position < len(data):
        if position + _ENTRY.size > len(data):
            raise CorruptWeights(f"{path} ends inside token {len(pieces)}")
        score, size = _ENTRY.unpack_from(data, position)
        position += _ENTRY.size
        if not 0 <= size <= len(data) - position:
            raise CorruptWeights(f"{path}: token {len(pieces)} claims {size} bytes")
        pieces.append(data[position : position + size])
        scores.append(score)
        position += size
    return pieces, scores


def _token(token_id: int, piece: bytes) -> str:
    if token_id < len(_SPECIAL):
        return _SPECIAL[token_id]
    if token_id < _END_BYTE_ID:
        return f"<0x{token_id - _FIRST_BYTE_ID:02X}>"
    return piece.decode(errors="replace").replace(" ", SPACE_MARK)
