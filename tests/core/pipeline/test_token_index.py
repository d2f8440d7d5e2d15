"""Matches of a text's end within it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.pipeline.token_index import LONGEST_MATCH, TokenIndex


class Record:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.notes: list[tuple[int, bool]] = []

    def note(self, length: int, agreed: bool) -> None:
        self.notes.append((length, agreed))


def guesses(index: TokenIndex, count: int) -> list[int]:
    draft: list[int] = []
    for ahead in range(count):
        draft.append(index.guess(ahead, draft))
    return draft


def indexed(token_ids: list[int], num_prompt_tokens: int = 0) -> tuple[TokenIndex, Record]:
    index, record = TokenIndex(token_ids, num_prompt_tokens=num_prompt_tokens), Record()
    index.catch_up(record)
    return index, record


def test_what_followed_the_latest_occurrence_is_guessed() -> None:
    index, _ = indexed([1, 2, 3, 1, 2, 4, 5, 1, 2])
    assert index.match_length == 2
    assert guesses(index, 4) == [4, 5, 1, 2]


def test_a_single_token_matches_where_its_pair_is_new() -> None:
    index, _ = indexed([1, 2, 3, 9, 2])
    assert index.match_length == 1
    assert guesses(index, 2) == [3, 9]


def test_a_text_without_repetition_matches_nothing() -> None:
    index, record = indexed(list(range(50)))
    assert index.match_length == 0
    assert record.notes == []


def test_a_match_that_reaches_the_end_repeats_itself() -> None:
    index, _ = indexed([7, 8, 9, 7, 8, 9])
    assert guesses(index, 7) == [7, 8, 9, 7, 8, 9, 7]


def test_a_match_is_followed_while_it_lasts() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 1, 2]
    index, record = indexed(tokens, num_prompt_tokens=8)
    tokens += [3, 4]
    index.catch_up(record)
    assert index.match_length == 4
    assert guesses(index, 2) == [5, 9]
    tokens.append(8)
    index.catch_up(record)
    assert index.match_length == 0
    assert record.notes == [(2, True), (3, True), (4, False)]


def test_the_prompt_teaches_nothing_about_agreement() -> None:
    tokens = [1, 2] * 10
    index, record = indexed(tokens, num_prompt_tokens=20)
    assert record.notes == []
    tokens += [1, 3]
    index.catch_up(record)
    assert [agreed for _, agreed in record.notes] == [True, False]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 5))
def test_a_match_is_real_and_of_the_length_it_says(tokens: list[int], step: int) -> None:
    shown: list[int] = []
    index, record = TokenIndex(shown, num_prompt_tokens=0), Record()
    for first in range(0, len(tokens), step):
        shown += tokens[first : first + step]
        index.catch_up(record)
        length = index.match_length
        if length == 0:
            assert shown[-1] not in shown[:-1]
            continue
        suffix = shown[-length:]
        followers = [
            shown[end] for end in range(length, len(shown)) if shown[end - length : end] == suffix
        ]
        assert index.guess(0, []) in followers
    assert all(1 <= length <= LONGEST_MATCH for length, _ in record.notes)
