"""The sampler: slots, penalties, log probabilities, distribution and independence of the batch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from core.kernels.sampling import reference
from core.kernels.sampling.cpu import log_probabilities, sample_rows
from core.sampling.parameters import SamplingParameters
from core.sampling.sampler import Sampler

PLAIN = SamplingParameters(max_tokens=100)
GREEDY = replace(PLAIN, temperature=0.0)


def random_logits(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(np.float32)


def indices(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def test_greedy_takes_the_largest_logit() -> None:
    sampler = Sampler(1000, 2)
    sampler.start(1, GREEDY)
    logits = random_logits(1, 1000)
    token_ids, logprobs = sampler.sample(logits, indices(1), indices(7))
    assert token_ids == [int(logits.argmax())]
    assert logprobs == ()


def test_every_row_uses_the_parameters_of_its_slot() -> None:
    sampler = Sampler(50, 4)
    sampler.start(0, GREEDY)
    sampler.start(3, replace(PLAIN, seed=8, temperature=2.0))
    logits = random_logits(2, 50)
    token_ids, _ = sampler.sample(logits, indices(3, 0), indices(5, 6))
    expected = reference.sample(
        logits[0], temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=8, position=5
    )
    assert token_ids == [expected, int(logits[1].argmax())]


def test_a_token_is_the_same_alone_and_in_any_batch() -> None:
    parameters = [
        replace(PLAIN, seed=s, top_k=[0, 7, 300][s % 3], top_p=[1.0, 0.8][s % 2], temperature=1 + s)
        for s in range(9)
    ]
    logits, positions = random_logits(9, 700), np.arange(100, 109, dtype=np.int32)
    alone = []
    for row, parameter in enumerate(parameters):
        sampler = Sampler(700, 1)
        sampler.start(0, parameter)
        alone += sampler.sample(logits[row : row + 1], indices(0), positions[row : row + 1])[0]
    order = np.random.default_rng(3).permutation(9).astype(np.int32)
    sampler = Sampler(700, 9)
    for slot, parameter in enumerate(parameters):
        sampler.start(slot, parameter)
    together, _ = sampler.sample(logits[order], order, positions[order])
    assert together == [alone[row] for row in order]


def test_logits_end_as_they_began() -> None:
    sampler = Sampler(90, 1)
    sampler.start(0, replace(PLAIN, repetition_penalty=1.5, presence_penalty=1.0), [1, 2, 3], 3)
    logits = random_logits(1, 90)
    before = logits.copy()
    sampler.sample(logits, indices(0), indices(3))
    np.testing.assert_array_equal(logits, before)


def test_penalties_follow_the_tokens_that_were_sampled() -> None:
    parameters = replace(
        PLAIN,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        temperature=0.7,
        seed=5,
    )
    prompt = [4, 4, 9, 11]
    sampler = Sampler(30, 3)
    sampler.start(2, parameters, prompt, len(prompt))
    known = list(prompt)
    for step in range(600):  # more than the first room for a history
        logits = random_logits(1, 30, seed=step)
        penalised = reference.penalise(
            logits[0],
            np.array(known),
            num_prompt_tokens=len(prompt),
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=0.2,
        )
        expected = reference.sample(
            penalised, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, seed=5, position=len(known)
        )
        token_ids, _ = sampler.sample(logits, indices(2), indices(len(known)))
        assert token_ids == [expected]
        known.append(expected)


def test_a_sequence_that_starts_again_with_its_tokens_goes_on_alike() -> None:
    """Preemption and failover send prompt and output once more."""
    parameters = replace(PLAIN, frequency_penalty=0.5, repetition_penalty=1.1, seed=3)
    prompt = [1, 2, 3]

    def generate(sampler: Sampler, known: list[int], until: int) -> list[int]:
        while len(known) < until:
            logits = random_logits(1, 40, seed=len(known))
            known = known + sampler.sample(logits, indices(0), indices(len(known)))[0]
        return known

    whole, first, second = (Sampler(40, 1) for _ in range(3))
    whole.start(0, parameters, prompt, len(prompt))
    first.start(0, parameters, prompt, len(prompt))
    half = generate(first, prompt, 20)
    second.start(0, parameters, half, len(prompt))
    assert generate(second, half, 40) == generate(whole, prompt, 40)


@pytest.mark.parametrize("num_taken_back", [1, 2, 9])
def test_tokens_that_are_taken_back_are_drawn_again_as_they_were(num_taken_back: int) -> None:
    """A micro-batch whose answer was lost on the way is computed once more."""
    parameters = replace(PLAIN, frequency_penalty=0.5, repetition_penalty=1.3, seed=3)
    prompt = [1, 2, 3]
    sampler = Sampler(12, 1)  # so few tokens that some are drawn several times
    sampler.start(0, parameters, prompt, len(prompt))

    def draw(known: list[int], until: int) -> list[int]:
        while len(known) < until:
            logits = random_logits(1, 12, seed=len(known))
            known = known + sampler.sample(logits, indices(0), indices(len(known)))[0]
        return known

    usual = draw(prompt, 20)
    left = usual[: 20 - num_taken_back]
    sampler.rewind(0, len(left) - 1)
    assert draw(left, 20) == usual
    assert draw(usual, 30)[20:] == draw_anew(parameters, usual, until=30)


def draw_anew(parameters: SamplingParameters, known: list[int], *, until: int) -> list[int]:
    """What a sampler draws that never saw anything else."""
    sampler = Sampler(12, 1)
    sampler.start(0, parameters, known, 3)
    drawn: list[int] = []
    while len(known) + len(drawn) < until:
        position = len(known) + len(drawn)
        logits = random_logits(1, 12, seed=position)
        drawn += sampler.sample(logits, indices(0), indices(position))[0]
    return drawn


def test_a_slot_that_is_used_again_forgets_the_sequence_before() -> None:
    used, fresh = Sampler(20, 1), Sampler(20, 1)
    used.start(0, replace(PLAIN, frequency_penalty=2.0, logprobs=3), [1, 2], 1)
    used.sample(random_logits(1, 20), indices(0), indices(2))
    used.end(0)
    for sampler in (used, fresh):
        sampler.start(0, replace(PLAIN, frequency_penalty=2.0, seed=9), [5], 1)
    for position in range(1, 8):
        logits = random_logits(1, 20, seed=position)
        results = [s.sample(logits, indices(0), indices(position)) for s in (used, fresh)]
        assert results[0] == results[1]


def test_padded_logits_give_the_tokens_of_dense_ones() -> None:
    """A head computes whole panels; its logits may be a part of wider rows."""
    sampler = Sampler(90, 2)
    for slot in range(2):
        sampler.start(slot, replace(PLAIN, seed=slot, logprobs=1))
    padded = random_logits(2, 128)
    dense = sampler.sample(padded[:, :90].copy(), indices(0, 1), indices(4, 4))
    assert sampler.sample(padded[:, :90], indices(0, 1), indices(4, 4)) == dense


def test_nothing_is_compiled_after_construction() -> None:
    sampler = Sampler(90, 2)
    compiled = [len(kernel.signatures) for kernel in (sample_rows, log_probabilities)]
    sampler.start(0, replace(PLAIN, logprobs=2, presence_penalty=1.0, top_p=0.5), [1, 2], 1)
    logits, index = random_logits(1, 128)[:, :90], indices(0)
    index.flags.writeable = False
    sampler.sample(logits, index, index.astype(np.int64))
    assert [len(kernel.signatures) for kernel in (sample_rows, log_probabilities)] == compiled


def test_no_rows_give_no_tokens() -> None:
    sampler = Sampler(90, 2)
    nothing = indices()
    assert sampler.sample(np.empty((0, 90), np.float32), nothing, nothing) == ([], ())


def test_log_probabilities_are_of_the_raw_logits() -> None:
    sampler = Sampler(200, 2)
    sampler.start(0, GREEDY)
    sampler.start(
        1, replace(PLAIN, temperature=0.3, top_k=5, repetition_penalty=3.0, logprobs=4), [7], 1
    )
    logits = random_logits(2, 200)
    token_ids, logprobs = sampler.sample(logits, indices(0, 1), indices(1, 1))
    assert logprobs[0] is None
    result = logprobs[1]
    assert result is not None
    wide = logits[1].astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum())
    assert result.token_id == token_ids[1]
    assert result.logprob == pytest.approx(expected[token_ids[1]], abs=1e-5)
    assert list(result.top_token_ids) == np.argsort(-expected)[:4].tolist()
    np.testing.assert_allclose(result.top_logprobs, np.sort(expected)[::-1][:4], atol=1e-5)


def test_no_alternatives_were_asked_for() -> None:
    sampler = Sampler(10, 1)
    sampler.start(0, replace(GREEDY, logprobs=0))
    _, (result,) = sampler.sample(random_logits(1, 10), indices(0), indices(1))
    assert result is not None
    assert result.top_token_ids == ()
    assert result.logprob < 0


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, range(6)),
        ({"temperature": 2.0}, range(6)),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.75}, [0, 1, 2]),
        ({"min_p": 0.3}, [0, 1, 2]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(filters: dict[str, float], kept: list[int]) -> None:
    """Chi-square of 20,000 draws by position, and by seed; 20.5 is p = 0.001 at 5 degrees."""
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    num_draws = 20_000
    weights = np.zeros(6)
    weights[list(kept)] = probabilities[list(kept)] ** (1 / filters.get("temperature", 1.0))
    expected = weights / weights.sum() * num_draws
    logits = np.log(probabilities).astype(np.float32)[None].repeat(num_draws, axis=0)
    by_position = Sampler(6, 1)
    by_position.start(0, replace(PLAIN, seed=1234, **filters))
    positions = np.arange(num_draws, dtype=np.int32)
    slots = np.zeros(num_draws, np.int32)
    by_seed = Sampler(6, num_draws)
    for slot in range(num_draws):
        by_seed.start(slot, replace(PLAIN, seed=slot, **filters))
    for token_ids in (
        by_position.sample(logits, slots, positions)[0],
        by_seed.sample(logits, positions, slots + 7)[0],
    ):
        counts = np.bincount(token_ids, minlength=6)
        drawn = expected > 0
        assert counts[~drawn].sum() == 0
        assert ((counts - expected)[drawn] ** 2 / expected[drawn]).sum() < 20.5


@pytest.mark.parametrize("module", ["parameters", "validation", "stops", "logprobs"])
def test_what_a_coordinator_needs_does_not_import_numba(module: str) -> None:
    code = f"import sys, core.sampling.{module}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
