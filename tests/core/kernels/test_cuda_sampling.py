"""CUDA sampling against the reference: the same tokens, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from core.kernels.sampling import cuda as kernels
from core.kernels.sampling import reference
from tests.support.cuda import LAUNCH, needs_cuda, on_device

pytestmark = [pytest.mark.cuda, needs_cuda]

GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
PLAIN = GREEDY | dict(temperature=1.0)


def sample_on_cuda(logits_SV: np.ndarray, rows: list[dict[str, Any]]) -> list[int]:
    parameters = kernels.row_parameters(
        temperatures_S=[row["temperature"] for row in rows],
        top_ks_S=[row["top_k"] for row in rows],
        top_ps_S=[row["top_p"] for row in rows],
        min_ps_S=[row["min_p"] for row in rows],
        seeds_S=[row["seed"] for row in rows],
        positions_S=[row["position"] for row in rows],
    )
    token_ids_S = on_device(np.full(len(rows), -1, np.int32))
    on_cuda = kernels.RowParameters(*(on_device(array) for array in parameters))
    logits, ranks_S = on_device(logits_SV), on_device(np.zeros(len(rows), np.int64))
    kernels.rank_likeliest(logits, ranks_S, launch=LAUNCH)
    kernels.sample_rows(logits, ranks_S, on_cuda, token_ids_S, launch=LAUNCH)
    return token_ids_S.copy_to_host().tolist()


@pytest.mark.parametrize(
    "filters",
    [
        GREEDY,
        PLAIN,
        PLAIN | dict(top_k=5, temperature=1.5),
        PLAIN | dict(top_p=0.7),
        PLAIN | dict(min_p=0.2),
        PLAIN | dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05),
    ],
    ids=lambda filters: "-".join(str(value) for value in filters.values()),
)
def test_tokens_equal_those_of_the_reference(filters: dict[str, Any]) -> None:
    random = np.random.default_rng(8)
    logits_SV = (random.standard_normal((2, 61)) * 3).astype(np.float32)
    rows = [filters | dict(seed=2**63 + 7 * s, position=1000 + s) for s in range(2)]
    expected = [
        reference.sample(logits_V, **row) for logits_V, row in zip(logits_SV, rows, strict=True)
    ]
    assert sample_on_cuda(logits_SV, rows) == expected


def test_equal_logits_are_ranked_by_id() -> None:
    logits_SV = np.zeros((3, 20), np.float32)
    rows = [
        GREEDY | dict(seed=1, position=0),
        PLAIN | dict(seed=1, position=0, top_k=1),
        PLAIN | dict(seed=1, position=0, top_p=0.5),
    ]
    tokens = sample_on_cuda(logits_SV, rows)
    assert tokens[:2] == [0, 0]
    assert tokens[2] == reference.sample(logits_SV[2], **rows[2])


def test_nan_and_minus_infinity_are_never_chosen() -> None:
    logits_SV = np.full((2, 9), -np.inf, np.float32)
    logits_SV[:, 2] = np.nan
    logits_SV[1, 5] = 0.0
    rows = [PLAIN | dict(seed=3, position=4)] * 2
    expected = [reference.sample(logits_V, **rows[0]) for logits_V in logits_SV]
    assert sample_on_cuda(logits_SV, rows) == expected
    assert expected[1] == 5


def test_penalties_equal_those_of_the_reference() -> None:
    logits_V = np.random.default_rng(9).standard_normal(12).astype(np.float32)
    known = np.array([3, 5, 3, 7, 7, 7], np.int32)
    penalties = dict(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.1)
    expected_V = reference.penalise(logits_V, known, num_prompt_tokens=2, **penalties)
    logits_SV = on_device(logits_V[None])
    kernels.penalise(
        logits_SV,
        ids_SM=on_device(np.array([[3, 5, 7, 0]], np.int32)),
        counts_SM=on_device(np.array([[1, 0, 3, 0]], np.int32)),
        lengths_S=on_device(np.array([3], np.int32)),
        penalties_S3=on_device(np.array([list(penalties.values())], np.float32)),
        launch=LAUNCH,
    )
    np.testing.assert_array_equal(logits_SV.copy_to_host()[0], expected_V)


def test_ranks_tell_the_likeliest_token_of_several_blocks() -> None:
    vocab_size = kernels.ELEMENTS_PER_BLOCK + 7
    logits_SV = np.random.default_rng(10).standard_normal((2, vocab_size)).astype(np.float32)
    logits_SV[0, [3, vocab_size - 1]] = 9.0
    logits_SV[1, vocab_size - 1] = 9.0
    ranks_S = on_device(np.zeros(2, np.int64))
    kernels.rank_likeliest(on_device(logits_SV), ranks_S, launch=LAUNCH)
    assert kernels.token_ids_of(ranks_S.copy_to_host()).tolist() == [3, vocab_size - 1]
