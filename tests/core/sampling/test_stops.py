"""Token-level stop conditions."""

from __future__ import annotations

import pytest

from core.sampling.parameters import SamplingParameters
from core.sampling.stops import finish_reason

EOS = (2, 7)


@pytest.mark.parametrize(
    ("token_id", "num_generated", "options", "expected"),
    [
        (5, 1, {}, None),
        (2, 1, {}, "stop"),
        (7, 3, {}, "stop"),
        (5, 4, {}, "length"),
        (5, 5, {}, "length"),
        (2, 4, {}, "stop"),
        (2, 1, {"ignore_eos": True}, None),
        (2, 4, {"ignore_eos": True}, "length"),
        (9, 1, {"stop_token_ids": (9,)}, "stop"),
        (9, 1, {"stop_token_ids": (9,), "ignore_eos": True}, "stop"),
        (2, 1, {"stop_token_ids": (2,), "ignore_eos": True}, "stop"),
    ],
)
def test_a_completion_ends_for_the_right_reason(
    token_id: int, num_generated: int, options: dict[str, object], expected: str | None
) -> None:
    parameters = SamplingParameters(max_tokens=4, **options)
    reason = finish_reason(
        token_id, num_generated=num_generated, parameters=parameters, eos_token_ids=EOS
    )
    assert reason == expected
