"""What the sampling reference means: generator, ranks, weights, filters, penalties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.kernels.sampling import reference
from core.kernels.sampling.constants import ONE


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """Known answers of Random123, the library that came with the paper."""
    assert reference.philox_4x32(counter, key) == words


def test_random_bits_differ_by_seed_and_by_position() -> None:
    seeds = [0, 1, 2**32, 2**64 - 1]
    bits = {reference.random_bits(seed, position) for seed in seeds for position in range(50)}
    assert len(bits) == 200


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_rank_keys_have_the_order_of_the_logits(logits: list[float]) -> None:
    logits_V = np.array(logits, np.float32)
    keys_V = reference.rank_keys(logits_V)
    less = logits_V[:, None] < logits_V[None, :]
    assert (keys_V[:, None] < keys_V[None, :])[less].all()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_weights_are_exponentials_to_float32_precision(temperature: float) -> None:
    logits_V = (np.random.default_rng(0).standard_normal(5000) * 3).astype(np.float32)
    weights_V = reference.fixed_point_weights(logits_V, temperature) / ONE
    differences = logits_V.astype(np.float64) - logits_V.max()
    expected_V = np.exp(differences / temperature)
    np.testing.assert_allclose(weights_V, expected_V, rtol=3e-6, atol=2 / ONE)
    assert weights_V.max() == 1.0


def kept(logits: list[float], **filters: float) -> list[int]:
    logits_V = np.array(logits, np.float32)
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    kept_V = reference.kept_tokens(
        reference.rank_keys(logits_V), reference.fixed_point_weights(logits_V, 1.0), **options
    )
    return np.flatnonzero(kept_V).tolist()


# Probabilities 0.1, 0.4, 0.3, 0.2.
LOGITS = [float(np.log(p)) for p in (0.1, 0.4, 0.3, 0.2)]


@pytest.mark.parametrize(
    ("filters", "token_ids"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.65}, [1, 2]),
        ({"top_p": 1e-9}, [1]),
        # Of the two likeliest, the first has 4/7 = 0.57.
        ({"top_k": 2, "top_p": 0.57}, [1]),
        ({"top_k": 2, "top_p": 0.58}, [1, 2]),
        ({"min_p": 0.51}, [1, 2]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "min_p": 0.3}, [1, 2, 3]),
    ],
)
def test_filters_keep_the_tokens_that_they_promise(
    filters: dict[str, float], token_ids: list[int]
) -> None:
    assert kept(LOGITS, **filters) == token_ids


def test_equal_logits_are_kept_in_order_of_ids() -> None:
    assert kept([1.0] * 6, top_k=2) == [0, 1]
    assert kept([1.0] * 6, top_p=0.5) == [0, 1, 2]


def test_penalties_look_where_the_contract_says() -> None:
    """Repetition at prompt and completion, presence and frequency at the completion only."""
    logits_V = np.array([2.0, -2.0, 2.0, -2.0, 2.0], np.float32)
    known = np.array([0, 1, 2, 2, 3], np.int32)
    result_V = reference.penalise(
        logits_V,
        known,
        num_prompt_tokens=2,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
    )
    np.testing.assert_allclose(result_V, [1.0, -4.0, 1.0 - 0.25 - 1.0, -4.0 - 0.25 - 0.5, 2.0])


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits_V = (np.random.default_rng(1).standard_normal(300) * 4).astype(np.float32)
    wide_V = logits_V.astype(np.float64)
    expected_V = wide_V - np.log(np.exp(wide_V).sum())
    result = reference.log_probabilities(logits_V, 17, 5)
    assert result.chosen == pytest.approx(expected_V[17], abs=1e-5)
    assert result.top_token_ids == np.argsort(-expected_V)[:5].tolist()
    np.testing.assert_allclose(result.top_logprobs, np.sort(expected_V)[::-1][:5], atol=1e-5)
