"""Quality tasks, against a model whose likelihoods are known."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from tests.benchmarks.tasks import (
    WIKITEXT,
    WINDOW,
    Question,
    answer,
    perplexity,
    read_questions,
    wikitext_windows,
)


def encode(text: str) -> list[int]:
    """A token for every character."""
    return [ord(character) for character in text]


def loves_b(token_ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Finds "b" likely and all else unlikely."""
    return np.array([-0.1 if token_id == ord("b") else -2.0 for token_id in token_ids[1:]])


def test_the_answer_has_the_highest_likelihood_per_character() -> None:
    question = Question(context="bbbb", choices=(" aaa", " bbb", " b"), right=1)
    assert answer(question, encode, loves_b) == 1


def test_the_context_does_not_count() -> None:
    question = Question(context="b" * 50, choices=(" bbbbbb", " ab"), right=0)
    assert answer(question, encode, loves_b) == 0


def test_perplexity_is_the_exponential_of_the_mean_over_all_targets() -> None:
    windows = [encode("abb"), encode("aa")]
    assert perplexity(windows, loves_b) == pytest.approx(np.exp((0.1 + 0.1 + 2.0) / 3))


def test_windows_follow_each_other_without_overlap() -> None:
    windows = wikitext_windows(encode, 3)
    assert [len(window) for window in windows] == [WINDOW] * 3
    text = WIKITEXT.read_text(encoding="utf-8")
    assert [token for window in windows for token in window] == encode(text[: 3 * WINDOW])


def test_questions_are_read_one_for_all_lines_of_their_choices() -> None:
    lines = [
        json.dumps(
            {
                "idx": idx,
                "label": label,
                "doc": {"choices": ["one", "two"]},
                "request": {"context": context, "continuation": f" {idx}"},
            }
        )
        for context, label in (("first", 1), ("second", 0), ("third", 1))
        for idx in range(2)
    ]
    questions = read_questions(lines, 2)
    assert questions == [
        Question(context="first", choices=(" one", " two"), right=1),
        Question(context="second", choices=(" one", " two"), right=0),
    ]
