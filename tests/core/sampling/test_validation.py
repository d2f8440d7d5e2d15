"""Ranges of sampling parameters, as generation.proto states them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from core.errors import InvalidInput
from core.sampling.parameters import SamplingParameters
from core.sampling.validation import validate_parameters, validate_stop_strings

VALID = SamplingParameters(max_tokens=1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0},
        {"top_k": 10**9, "top_p": 1e-6},
        {"repetition_penalty": 100.0, "presence_penalty": -100.0, "frequency_penalty": 100.0},
        {"seed": 2**64 - 1, "logprobs": 20, "stop_token_ids": (0, 99)},
        {"logprobs": 0, "stop_token_ids": (1,) * 64},
    ],
    ids=str,
)
def test_values_at_the_edges_are_taken(fields: dict[str, Any]) -> None:
    validate_parameters(replace(VALID, **fields), vocab_size=100)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 100.5),
        ("presence_penalty", 101.0),
        ("frequency_penalty", -101.0),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("logprobs", 21),
        *(
            (field, value)
            for field in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
            for value in (math.nan, math.inf, -math.inf)
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidInput) as refusal:
        validate_parameters(replace(VALID, **{field: value}), vocab_size=100)
    assert refusal.value.field == f"sampling.{field}"
    assert refusal.value.value == repr(value)
    assert refusal.value.allowed


@pytest.mark.parametrize(
    ("token_ids", "field"),
    [
        ((5, 100), "sampling.stop_token_ids[1]"),
        ((-1,), "sampling.stop_token_ids[0]"),
        ((1,) * 65, "sampling.stop_token_ids"),
    ],
)
def test_stop_token_ids_are_within_the_vocabulary(token_ids: tuple[int, ...], field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        validate_parameters(replace(VALID, stop_token_ids=token_ids), vocab_size=100)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("stops", "field"),
    [
        (["."] * 17, "sampling.stop"),
        (["a", ""], "sampling.stop[1]"),
        (["ä" * 129], "sampling.stop[0]"),
    ],
)
def test_stop_strings_out_of_bounds_are_refused(stops: list[str], field: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        validate_stop_strings(stops)
    assert refusal.value.field == field


def test_stop_strings_at_the_bounds_are_taken() -> None:
    validate_stop_strings(["ä" * 128] * 16)
    validate_stop_strings([])
