"""Keys and values that another sequence computed: the same answer, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from core.pipeline.actions import EmitTokens, FlushUpdates, RunMicroBatch
from core.pipeline.batch import PositionLogprobs
from core.pipeline.cut import Part
from core.pipeline.events import (
    Event,
    LinkReady,
    PipelineFacts,
    PipelineKnown,
    ReplicaFacts,
    ReplicaReady,
    RequestArrived,
    TokensSampled,
)
from core.pipeline.scheduler import Scheduler
from core.pipeline.settings import SchedulerSettings
from core.sampling.parameters import SamplingParameters
from tests.core.engine.conftest import OpenModel
from tests.core.engine.test_engine_invariance import GREEDY, SEQUENCE, compute, run_logits
from tests.support.chain import Chain, Run

OpenOne = Callable[[str], OpenModel]
FORMATS = [("fp32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("int8", "f32"), ("bf16", "int8")]
SAMPLING = [
    GREEDY,
    SamplingParameters(max_tokens=8, temperature=1.2, top_p=0.9, seed=7),
    SamplingParameters(max_tokens=8, temperature=0.0, repetition_penalty=1.7, logprobs=5),
    SamplingParameters(
        max_tokens=8, temperature=0.8, seed=3, presence_penalty=0.5, frequency_penalty=0.7
    ),
]


@pytest.mark.parametrize(("number_format", "wire"), FORMATS)
@pytest.mark.parametrize("name", ["llama-odd-sizes", "mistral", "qwen3-many-queries"])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_logits_behind_shared_blocks_are_those_of_a_sequence_of_its_own(
    name: str, num_stages: int, number_format: str, wire: str, open_model: OpenOne
) -> None:
    chain = open_model(name).chain(num_stages=num_stages, number_format=number_format, wire=wire)
    expected = compute(chain, [(len(SEQUENCE), [])], seed=0)
    for num_cached, chunk in ((16, 54), (48, 5), (64, 6)):
        chain.start(0, GREEDY)
        run_logits(chain, [Run(0, [*SEQUENCE[:num_cached], 1, 2, 3], num_samples=0)], slot=0)
        chain.start(5, GREEDY, like_slot=0, num_cached=num_cached)
        chain.end(0)  # its own block goes to the newcomer, the shared ones remain
        parts = [
            run_logits(chain, [Run(5, SEQUENCE[first : first + chunk], num_samples=0)], slot=5)
            for first in range(num_cached, len(SEQUENCE), chunk)
        ]
        chain.end(5)
        np.testing.assert_array_equal(np.concatenate(parts), expected[num_cached:])


@pytest.mark.parametrize("reader_is_first", [False, True])
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_blocks_can_be_read_in_the_micro_batch_that_writes_them(
    number_format: str, reader_is_first: bool, open_model: OpenOne
) -> None:
    chain = open_model("mistral").chain(num_stages=2, number_format=number_format)
    expected = compute(chain, [(len(SEQUENCE), [])], seed=0)
    chain.start(0, GREEDY)
    chain._blocks[0] = [chain._free_blocks.pop(0) for _ in range(3)]
    chain._added += [(0, block) for block in chain._blocks[0]]
    chain.start(5, GREEDY, like_slot=0, num_cached=48)
    runs = [Run(0, SEQUENCE[:48], num_samples=0), Run(5, SEQUENCE[48:], num_samples=0)]
    actual = run_logits(chain, runs[::-1] if reader_is_first else runs, slot=5)
    chain.end(0)
    chain.end(5)
    np.testing.assert_array_equal(actual, expected[48:])


class Served:
    """A scheduler over real engines: what each request was answered."""

    def __init__(self, chain: Chain, *, shares_prefixes: bool, max_rows: int) -> None:
        self._engines = chain.engines
        self._scheduler = Scheduler(SchedulerSettings(shares_prefixes=shares_prefixes))
        self._results: list[TokensSampled] = []
        self._num_events = self._num_requests = 0
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[PositionLogprobs]] = {}
        self.num_cached: dict[int, int] = {}
        num_stages = len(chain.engines)
        facts = PipelineFacts(num_layers=num_stages, num_slots=8, context_length=256)
        self._handle(PipelineKnown(facts=facts))
        for index in range(num_stages):
            # One layer a stage, as far as the scheduler knows.
            part = Part(index, ("",))
            replica = ReplicaFacts(num_kv_blocks=60, max_rows=max_rows, part=part)
            self._handle(ReplicaReady(replica_id=index, facts=replica))
        for index in range(num_stages - 1):
            self._handle(LinkReady(upstream_id=index, downstream_id=index + 1))

    def answer(self, prompts: list[list[int]], sampling: list[SamplingParameters]) -> None:
        """Serves requests that arrive together."""
        requests = []
        for prompt, parameters in zip(prompts, sampling, strict=True):
            number = self._num_requests
            self._num_requests += 1
            self.tokens[number], self.logprobs[number] = [], []
            requests.append(
                RequestArrived(request_id=number, token_ids=prompt, sampling=parameters)
            )
        self._handle(*requests)
        while self._results:
            self._handle(self._results.pop(0))

    def _handle(self, *events: Event) -> None:
        self._num_events += 1
        for action in self._scheduler.handle_all(events, 0.01 * self._num_events):
            match action:
                case RunMicroBatch():
                    self._run(action)
                case FlushUpdates():
                    self._engines[action.replica_id].apply(action.updates)
                case EmitTokens():
                    self.tokens[action.request_id] += action.token_ids
                    self.logprobs[action.request_id] += action.logprobs
                    if action.usage is not None:
                        self.num_cached[action.request_id] = action.usage.cached_tokens

    def _run(self, action: RunMicroBatch) -> None:
        hidden = sampled = None
        for number, replica_id in enumerate(action.path):
            result = self._engines[replica_id].step(action.for_replica(number), hidden)
            hidden, sampled = result.hidden_TH, result.sampled
            if hidden is not None:
                hidden = hidden.copy()
        assert sampled is not None
        self._results.append(
            TokensSampled(
                micro_batch_id=action.micro_batch_id,
                token_ids=sampled.token_ids,
                logprobs=sampled.logprobs,
            )
        )


@pytest.mark.parametrize(("number_format", "wire"), FORMATS)
@pytest.mark.parametrize(("num_stages", "max_rows"), [(1, 300), (2, 33), (4, 16)])
def test_answers_are_the_same_with_and_without_a_prefix_cache(
    num_stages: int, max_rows: int, number_format: str, wire: str, open_model: OpenOne
) -> None:
    """Greedy, drawn, with penalties that count the prompt, with log probabilities."""
    chain = open_model("llama").chain(num_stages=num_stages, number_format=number_format, wire=wire)
    prompts = [[*SEQUENCE[:end], 9] for end in (40, 70, 33, 64)]
    served = {
        shares: Served(chain, shares_prefixes=shares, max_rows=max_rows) for shares in (False, True)
    }
    for one in served.values():
        for _ in range(2):
            one.answer(prompts, SAMPLING)
            one.answer([[*prompts[0], *one.tokens[0], 5]], SAMPLING[2:3])
    without, cached = served[False], served[True]
    assert set(without.num_cached.values()) == {0}
    # The second time everything but the last, unfilled block is known; after 41 + 8 tokens 48 are.
    assert [cached.num_cached[number] for number in range(4, 10)] == [48, 32, 64, 32, 64, 48]
    assert cached.tokens == without.tokens
    assert cached.logprobs == without.logprobs
    assert all(len(entries) == 8 for number, entries in cached.logprobs.items() if number in (2, 7))
