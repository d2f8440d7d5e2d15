"""Which tokens are guessed: as many as pay, for sequences that allow it."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import InvalidInput
from core.pipeline.sequences import Sequence
from core.pipeline.speculation import Speculation, SpeculationSettings, Stakes, count_accepted
from core.sampling.parameters import SamplingParameters

LOOP = [5, 6, 7, 8] * 8


def sequence(token_ids: list[int], *, num_prompt: int | None = None, **fields: Any) -> Sequence:
    sampling = SamplingParameters(**({"max_tokens": 100, "temperature": 0.0} | fields))
    return Sequence(
        request_id=1,
        order=1,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids) if num_prompt is None else num_prompt,
        sampling=sampling,
        arrived_s=0.0,
    )


def cheap() -> Stakes:
    return Stakes(tokens=1.0, seconds=1.0, row_s=1e-6)


def speculation(**fields: Any) -> Speculation:
    return Speculation(SpeculationSettings(**fields))


def test_a_cheap_row_is_filled_up_to_the_bound() -> None:
    guessing = speculation(max_draft_tokens=6)
    assert guessing.draft(sequence(LOOP), cheap(), most=100) == [5, 6, 7, 8, 5, 6]
    assert guessing.draft(sequence(LOOP), cheap(), most=2) == [5, 6]
    assert guessing.num_drafted == 8


def test_the_dearer_a_row_the_fewer_are_guessed() -> None:
    lengths = []
    for row_s in (0.05, 0.2, 0.4, 0.7, 0.95):
        stakes = Stakes(tokens=1.0, seconds=1.0, row_s=row_s)
        lengths.append(len(speculation().draft(sequence(LOOP), stakes, most=100)))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 4
    assert lengths[-1] == 0


def test_every_row_that_is_added_raises_tokens_per_second() -> None:
    stakes = Stakes(tokens=3.0, seconds=1.0, row_s=0.1)
    guessing = speculation()
    rates = [stakes.tokens / stakes.seconds]
    for _ in range(4):
        guessing.draft(sequence(LOOP), stakes, most=1)
        rates.append(stakes.tokens / stakes.seconds)
    assert rates == sorted(set(rates))


def test_nothing_pays_in_a_full_pipeline() -> None:
    full = Stakes(tokens=64.0, seconds=1.0, row_s=1 / 64)
    assert not speculation().pays(full)
    assert speculation().pays(cheap())
    assert not speculation(max_draft_tokens=0).pays(cheap())


def test_no_guess_outlives_the_last_token() -> None:
    guessing = speculation()
    near_its_end = sequence(LOOP, num_prompt=len(LOOP) - 7, max_tokens=10)
    assert len(guessing.draft(near_its_end, cheap(), most=100)) == 2
    last = sequence(LOOP, num_prompt=len(LOOP) - 9, max_tokens=10)
    assert guessing.draft(last, cheap(), most=100) == []


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_count_tokens_so_that_none_is_guessed(penalty: str) -> None:
    assert speculation().draft(sequence(LOOP, **{penalty: 1.5}), cheap(), most=9) == []


def test_what_guesses_are_worth_is_learned_from_tokens_that_were_not_guessed() -> None:
    guessing = speculation()
    stakes = Stakes(tokens=1.0, seconds=1.0, row_s=0.1)
    misleading = sequence([1, 2, 3], num_prompt=3, max_tokens=10_000)
    assert len(guessing.draft(sequence([1, 2, 3, 1, 2]), stakes, most=9)) > 0
    guessing.draft(misleading, cheap(), most=1)
    for number in range(400):
        misleading.token_ids += [1, 2, 100 + number]
    guessing.draft(misleading, cheap(), most=1)
    assert guessing.draft(sequence([1, 2, 3, 1, 2]), stakes, most=9) == []


def test_greedy_and_drawn_text_are_told_apart() -> None:
    guessing = speculation()
    stakes = Stakes(tokens=1.0, seconds=1.0, row_s=0.1)
    drawn = sequence([1, 2, 3], num_prompt=3, max_tokens=10_000, temperature=1.0)
    guessing.draft(drawn, cheap(), most=1)
    for number in range(400):
        drawn.token_ids += [1, 2, 100 + number]
    guessing.draft(drawn, cheap(), most=1)
    assert len(guessing.draft(sequence([1, 2, 3, 1, 2]), stakes, most=9)) > 0


def test_guesses_count_up_to_the_first_wrong_one() -> None:
    assert count_accepted([1, 2, 3], [1, 2, 3, 4]) == 3
    assert count_accepted([1, 2, 3], [1, 9, 3, 4]) == 1
    assert count_accepted([1, 2, 3], [9, 2, 3, 4]) == 0
    assert count_accepted([], [4]) == 0


@pytest.mark.parametrize("fields", [{"max_draft_tokens": -1}, {"margin": 0.9}])
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        SpeculationSettings(**fields)
