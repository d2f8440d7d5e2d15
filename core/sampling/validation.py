"""Whether sampling parameters are within the ranges that generation.proto states."""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.errors import InvalidInput
from core.sampling.parameters import SamplingParameters

MOST_LOGPROBS = 20
MOST_STOP_TOKEN_IDS = 64
MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING_BYTES = 256
LARGEST_SEED = 2**64 - 1
HOTTEST = 100.0
LARGEST_PENALTY = 100.0
PREFIX = "sampling."


def validate_parameters(parameters: SamplingParameters, *, vocab_size: int) -> None:
    """Raises InvalidInput, with the path of the first field that is out of range."""
    _check_integer("max_tokens", parameters.max_tokens, 1, None)
    _check_number("temperature", parameters.temperature, 0.0, HOTTEST)
    _check_integer("top_k", parameters.top_k, 0, None)
    _check_number("top_p", parameters.top_p, 0.0, 1.0, above_least=True)
    _check_number("min_p", parameters.min_p, 0.0, 1.0)
    _check_number(
        "repetition_penalty",
        parameters.repetition_penalty,
        0.0,
        LARGEST_PENALTY,
        above_least=True,
    )
    for field in ("presence_penalty", "frequency_penalty"):
        _check_number(field, getattr(parameters, field), -LARGEST_PENALTY, LARGEST_PENALTY)
    _check_integer("seed", parameters.seed, 0, LARGEST_SEED)
    if parameters.logprobs is not None:
        _check_integer("logprobs", parameters.logprobs, 0, MOST_LOGPROBS)
    _check_stop_token_ids(parameters.stop_token_ids, vocab_size)


def validate_stop_strings(stops: Sequence[str]) -> None:
    """Raises InvalidInput unless there are at most 16, none empty, none above 256 bytes."""
    if len(stops) > MOST_STOP_STRINGS:
        raise InvalidInput(PREFIX + "stop", len(stops), f"at most {MOST_STOP_STRINGS} strings")
    for index, stop in enumerate(stops):
        if not 1 <= len(stop.encode()) <= LONGEST_STOP_STRING_BYTES:
            allowed = f"1 to {LONGEST_STOP_STRING_BYTES} bytes"
            raise InvalidInput(f"{PREFIX}stop[{index}]", stop, allowed)


def _check_number(
    field: str, value: float, least: float, most: float, *, above_least: bool = False
) -> None:
    if math.isfinite(value) and least <= value <= most and not (above_least and value == least):
        return
    opening = "(" if above_least else "["
    raise InvalidInput(PREFIX + field, value, f"a number in {opening}{least:g}, {most:g}]")


def _check_integer(field: str, value: int, least: int, most: int | None) -> None:
    if value >= least and (most is None or value <= most):
        return
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    raise InvalidInput(PREFIX + field, value, allowed)


def _check_stop_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    if len(token_ids) > MOST_STOP_TOKEN_IDS:
        allowed = f"at most {MOST_STOP_TOKEN_IDS} ids"
        raise InvalidInput(PREFIX + "stop_token_ids", len(token_ids), allowed)
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            field = f"{PREFIX}stop_token_ids[{index}]"
            raise InvalidInput(field, token_id, f"0 to {vocab_size - 1}")
