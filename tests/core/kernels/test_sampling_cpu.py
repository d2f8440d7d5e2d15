"""The CPU's sampling against the reference: the same tokens, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.kernels.sampling import cpu, reference
from core.kernels.sampling.cpu_arithmetic import random_bits, threshold_of

FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.0, 50.0]),
        "top_k": st.sampled_from([0, 1, 3, 40, 1000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
        "position": st.integers(0, 2**31 - 1),
    }
)


def sample_on_cpu(logits_SV: npt.NDArray[np.float32], rows: list[dict[str, Any]]) -> list[int]:
    """Samples rows without penalties, each in the slot of its index."""
    num_rows = len(rows)
    slots = np.arange(num_rows, dtype=np.int32)
    token_ids_S = np.full(num_rows, -1, np.int32)
    cpu.sample_rows(
        logits_SV,
        slots,
        np.array([row["position"] for row in rows], np.int32),
        np.array([row["temperature"] for row in rows], np.float64),
        np.array([row["top_k"] for row in rows], np.int64),
        np.array([row["top_p"] for row in rows], np.float64),
        np.array([row["min_p"] for row in rows], np.float64),
        np.array([row["seed"] for row in rows], np.uint64),
        np.zeros((num_rows, 3), np.float32),
        np.zeros((num_rows, 0), np.int32),
        np.zeros((num_rows, 0), np.int32),
        np.full(num_rows, -1, np.int32),
        token_ids_S,
    )
    return token_ids_S.tolist()


def assert_same_token(logits_V: npt.NDArray[np.float32], row: dict[str, Any]) -> None:
    assert sample_on_cpu(logits_V[None].copy(), [row]) == [reference.sample(logits_V, **row)]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
def test_random_bits_are_those_of_the_reference(seed: int, position: int) -> None:
    bits = random_bits(np.uint64(seed), np.int32(position))
    assert bits == reference.random_bits(seed, position)


@settings(deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 2**64 - 1))
def test_the_threshold_is_an_exact_product(total: int, bits: int) -> None:
    assert threshold_of(np.int64(total), np.uint64(bits)) == (total * bits) >> 64


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.sampled_from([1, 2, 127, 128, 129, 1000, 5003]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    row=FILTERS,
)
def test_tokens_equal_those_of_the_reference(
    seed: int, vocab_size: int, spread: float, row: dict[str, Any]
) -> None:
    random = np.random.default_rng(seed)
    assert_same_token((random.standard_normal(vocab_size) * spread).astype(np.float32), row)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-0.0, 0.0, 1.0, 2.0, -3.0]), min_size=1, max_size=400),
    row=FILTERS,
)
def test_ties_are_broken_as_in_the_reference(logits: list[float], row: dict[str, Any]) -> None:
    assert_same_token(np.array(logits, np.float32), row)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(
        st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=300
    ),
    row=FILTERS,
)
def test_logits_that_are_no_numbers_change_nothing_else(
    logits: list[float], row: dict[str, Any]
) -> None:
    logits_V = np.array(logits, np.float32)
    assert_same_token(logits_V, row)
    token_id = sample_on_cpu(logits_V[None].copy(), [row])[0]
    assert not np.isnan(logits_V[token_id]) or np.isnan(logits_V).all()


# Every way to a cut, at the size of a real vocabulary.
@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 50},
        {"top_k": 5000},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 5000, "top_p": 0.9, "min_p": 0.01},
        {"top_p": 0.9},
        {"top_p": 0.95, "temperature": 5.0},
        {"top_p": 0.3, "temperature": 0.5},
        {"min_p": 0.05},
    ],
    ids=str,
)
def test_a_real_vocabulary_gives_the_tokens_of_the_reference(filters: dict[str, Any]) -> None:
    random = np.random.default_rng(6)
    logits_SV = (random.standard_normal((3, 49_152)) * 2.5).astype(np.float32)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = [defaults | filters | {"seed": s, "position": 9} for s in range(3)]
    expected = [
        reference.sample(logits_V, **row) for logits_V, row in zip(logits_SV, rows, strict=True)
    ]
    assert sample_on_cpu(logits_SV.copy(), rows) == expected


@pytest.mark.parametrize("vocab_size", [5, 128, 3001])
def test_log_probabilities_equal_those_of_the_reference(vocab_size: int) -> None:
    random = np.random.default_rng(7)
    logits_V = (random.standard_normal(vocab_size) * 3).astype(np.float32)
    expected = reference.log_probabilities(logits_V, 3, 5)
    ids, logprobs = np.full(5, -1, np.int32), np.full(5, np.nan, np.float64)
    chosen = cpu.log_probabilities(logits_V, 3, 5, ids, logprobs)
    assert chosen == pytest.approx(expected.chosen, abs=1e-12)
    assert ids.tolist() == expected.top_token_ids
    np.testing.assert_allclose(logprobs, expected.top_logprobs, rtol=0, atol=1e-12)
