"""Incremental text: no broken characters, and the pieces are the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.tokens.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 49_151), max_size=40)
RELAXED = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)


def deltas(tokenizer: Tokenizer, token_ids: list[int], **options: Any) -> list[str]:
    detokenizer = tokenizer.detokenizer(**options)
    return [*(detokenizer.push([token_id]) for token_id in token_ids), detokenizer.flush()]


@RELAXED
@given(IDS, st.booleans())
def test_pieces_of_a_byte_level_vocabulary_are_the_whole(
    smollm2: Tokenizer, token_ids: list[int], skip: bool
) -> None:
    pieces = deltas(smollm2, token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == smollm2.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == smollm2._backend.decode(token_ids, skip_special_tokens=skip)


@RELAXED
@given(st.text(max_size=40))
def test_a_text_survives_byte_level_tokens(tiny: Tokenizer, text: str) -> None:
    pieces = deltas(tiny, tiny.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@RELAXED
@given(st.lists(st.integers(0, 31_999), max_size=40))
def test_pieces_of_a_sentence_piece_vocabulary_are_the_whole(
    stories15m: Tokenizer, token_ids: list[int]
) -> None:
    assert "".join(deltas(stories15m, token_ids)) == stories15m.decode(token_ids)


@RELAXED
@given(st.text(st.characters(exclude_characters="\ufffd▁", exclude_categories=["Cs"])))
def test_a_text_survives_byte_fallback(stories15m: Tokenizer, text: str) -> None:
    token_ids = stories15m.encode(text, add_bos=False)
    assert "".join(deltas(stories15m, token_ids)) == text
    assert stories15m._backend.decode(token_ids, skip_special_tokens=False) == text


def test_a_character_of_several_tokens_comes_whole(smollm2: Tokenizer) -> None:
    pieces = deltas(smollm2, smollm2.encode("🤷🏽"))
    assert [piece for piece in pieces if piece] == ["🤷", "🏽"]


def test_an_incomplete_character_is_replaced_at_the_end(smollm2: Tokenizer) -> None:
    token_ids = smollm2.encode("🤷")[:-1]
    pieces = deltas(smollm2, token_ids)
    assert pieces == ["", "", "\ufffd"][-len(pieces) :]


@pytest.mark.parametrize(("continues", "text"), [(False, "once"), (True, " once")])
def test_a_leading_space_is_shown_only_after_a_text(
    stories15m: Tokenizer, continues: bool, text: str
) -> None:
    token_ids = stories15m.encode("once", add_bos=False)
    assert "".join(deltas(stories15m, token_ids, continues_text=continues)) == text


def test_ids_beyond_the_vocabulary_add_nothing(tiny: Tokenizer) -> None:
    token_ids = [*tiny.encode("hello"), 100_000]
    assert tiny.decode(token_ids) == "hello"


def test_special_tokens_are_left_out_where_asked(tiny: Tokenizer) -> None:
    token_ids = tiny.encode("hello<|end|>")
    assert tiny.decode(token_ids) == "hello<|end|>"
    assert tiny.decode(token_ids, skip_special_tokens=True) == "hello"
