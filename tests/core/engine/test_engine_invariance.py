"""What a sequence computes depends on itself alone: the property that failover rests on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.engine.engine import Engine
from core.pipeline.batch import MicroBatch
from core.sampling.parameters import SamplingParameters
from tests.core.engine.conftest import NIBBLE_MODELS, OpenModel
from tests.support.chain import Chain, Run

GREEDY = SamplingParameters(max_tokens=8, temperature=0.0)
SEQUENCE = [int(token) for token in np.random.default_rng(3).integers(0, 263, 70)]
OpenOne = Callable[[str], OpenModel]
FloatArray = npt.NDArray[np.float32]


def run_logits(chain: Chain, runs: list[Run], slot: int) -> FloatArray:
    """One micro-batch through all stages; the logits of the rows of `slot`."""
    batch: MicroBatch = chain._micro_batch(runs)
    hidden = None
    for engine in chain.engines[:-1]:
        hidden = engine.step(batch, hidden).hidden_TH
        assert hidden is not None
        hidden = hidden.copy()
    last: Engine = chain.engines[-1]
    mine_T = np.repeat(batch.slots_R, batch.num_rows_R) == slot
    return last.logits(batch, hidden)[mine_T].copy()


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, list[tuple[int, int]]]]:
    """Chunk sizes of our sequence, each with companions: (place in the batch, rows)."""
    schedule, left = [], len(SEQUENCE)
    while left:
        size = draw(st.integers(1, left))
        companions = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=4))
        schedule.append((size, [(int(before), rows) for before, rows in companions]))
        left -= size
    return schedule


def compute(
    chain: Chain, schedule: list[tuple[int, list[tuple[int, int]]]], seed: int
) -> FloatArray:
    """Logits of SEQUENCE, computed in slot 5 as scheduled, with random companions."""
    random = np.random.default_rng(seed)
    chain.start(5, GREEDY)
    parts, first, companions = [], 0, list(range(6, 6 + 4))
    for size, others in schedule:
        before: list[Run] = []
        after: list[Run] = []
        for slot, (goes_first, num_rows) in zip(companions, others, strict=False):
            chain.start(slot, GREEDY)
            ids = [int(token) for token in random.integers(0, 263, num_rows)]
            (before if goes_first else after).append(Run(slot, ids, num_samples=0))
        mine = Run(5, SEQUENCE[first : first + size], num_samples=0)
        parts.append(run_logits(chain, [*before, mine, *after], slot=5))
        for run in before + after:
            chain.end(run.slot)
        first += size
    chain.end(5)
    return np.concatenate(parts)


NAMES = ("llama-odd-sizes", "mistral", "qwen3-many-queries")
FORMATS = (("fp32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("int8", "f32"), ("int8", "bf16"))


@pytest.mark.parametrize(
    ("name", "number_format", "wire"),
    [(name, *one) for name in NAMES for one in FORMATS]
    + [(name, "int4", wire) for name in NIBBLE_MODELS for wire in ("f32", "bf16")],
)
def test_logits_do_not_depend_on_companions_chunks_splits_or_blocks(
    name: str, number_format: str, wire: str, open_model: OpenOne
) -> None:
    model = open_model(name)
    unsplit = model.chain(num_stages=1, number_format=number_format, wire=wire)
    expected = compute(unsplit, [(len(SEQUENCE), [])], seed=0)
    assert np.isfinite(expected).all()

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schedules(), st.integers(1, model.config.num_layers), st.integers(0, 1000))
    def holds(schedule: list, num_stages: int, seed: int) -> None:
        chain = model.chain(num_stages=num_stages, number_format=number_format, wire=wire)
        np.testing.assert_array_equal(compute(chain, schedule, seed), expected)

    holds()


@pytest.mark.parametrize(
    ("name", "number_format"),
    [("mistral", "fp32"), ("mistral", "bf16"), ("mistral", "int8"), ("llama-mixed", "int4")],
)
def test_a_preempted_sequence_computes_the_same_again(
    name: str, number_format: str, open_model: OpenOne
) -> None:
    chain = open_model(name).chain(num_stages=2, number_format=number_format)
    expected = compute(chain, [(len(SEQUENCE), [])], seed=0)
    chain.start(5, GREEDY)
    run_logits(chain, [Run(5, SEQUENCE[:41], num_samples=0)], slot=5)
    chain.end(5)  # its blocks go to others meanwhile
    chain.start(7, GREEDY)
    run_logits(chain, [Run(7, SEQUENCE[::-1], num_samples=0)], slot=7)
    actual = compute(chain, [(50, []), (len(SEQUENCE) - 50, [])], seed=0)
    chain.end(7)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "number_format"),
    [("llama-odd-sizes", number_format) for number_format in ("fp32", "bf16", "int8")]
    + [("llama-nibbles", "int4"), ("llama-mixed", "int4")],
)
def test_greedy_tokens_are_the_arg_max_of_the_logits(
    name: str, number_format: str, open_model: OpenOne
) -> None:
    chain = open_model(name).chain(num_stages=1, number_format=number_format)
    logits = compute(chain, [(len(SEQUENCE), [])], seed=0)
    chain.start(0, GREEDY)
    tokens = [chain.step([Run(0, [token])])[0] for token in SEQUENCE]
    chain.end(0)
    assert tokens == logits.argmax(axis=1).tolist()


def test_greedy_and_drawn_tokens_of_one_batch_come_in_the_order_of_its_runs(
    open_model: OpenOne,
) -> None:
    chain = open_model("llama-odd-sizes").chain(num_stages=1)
    prompts = [SEQUENCE[first : first + 5] for first in range(0, 40, 5)]
    drawn = SamplingParameters(max_tokens=6, temperature=1.5, seed=9)
    penalised = SamplingParameters(max_tokens=6, temperature=0.0, repetition_penalty=1.8)
    sampling = [GREEDY, drawn, GREEDY, penalised, drawn, GREEDY, penalised, GREEDY]
    together = chain.generate(prompts, sampling, chunk=3)
    alone = [
        chain.generate([prompt], [parameters])[0]
        for prompt, parameters in zip(prompts, sampling, strict=True)
    ]
    assert together == alone
    assert [len(tokens) for tokens in together] == [8, 6, 8, 6, 6, 8, 6, 8]


def test_log_probabilities_stand_beside_the_tokens_that_asked_for_them(
    open_model: OpenOne,
) -> None:
    chain = open_model("llama-odd-sizes").chain(num_stages=1)
    asking = SamplingParameters(max_tokens=1, temperature=0.0, logprobs=2)
    chain.start(0, GREEDY)
    chain.start(1, asking)
    batch = chain._micro_batch([Run(0, SEQUENCE[:4]), Run(1, SEQUENCE[:4])])
    sampled = chain.engines[0].step(batch, None).sampled
    chain.end(0)
    chain.end(1)
    assert sampled is not None
    assert sampled.token_ids[0] == sampled.token_ids[1]
    nothing, logprobs = sampled.logprobs
    assert nothing is None
    assert logprobs is not None
    assert logprobs.token_id == sampled.token_ids[1] == logprobs.top_token_ids[0]
    assert len(logprobs.top_logprobs) == 2
    assert logprobs.logprob == logprobs.top_logprobs[0] < 0
