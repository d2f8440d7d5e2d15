"""Rows that are sent again from the log: those that were sent, to the bit, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from core.engine.engine import Engine
from core.errors import ProtocolViolation
from core.pipeline.batch import MicroBatch, SequenceUpdates
from tests.core.engine.conftest import OpenModel
from tests.core.engine.test_engine_invariance import GREEDY, SEQUENCE
from tests.core.engine.test_engine_protocol import SETTINGS, build, make_batch, start
from tests.support.chain import Chain, Run

OpenOne = Callable[[str], OpenModel]
FORMATS = [
    *(("fp32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("int8", "f32"), ("int8", "bf16")),
    *(("bf16", "int8"), ("int8", "int8")),
]


def send(chain: Chain, runs: Sequence[Run]) -> np.ndarray:
    """Computes a micro-batch on the first two stages; returns what the second one sends."""
    batch = chain._micro_batch(runs)
    first = chain.engines[0].step(batch, None).hidden_TH
    assert first is not None
    second = chain.engines[1].step(batch, first.copy()).hidden_TH
    assert second is not None
    chain.engines[2].apply(batch.updates)
    return second.copy()


def replay(engine: Engine, slots: list[int], firsts: list[int], counts: list[int]) -> np.ndarray:
    batch = replace(make_batch(slots, firsts, counts, token_ids=[]), replays=True)
    sent = engine.step(batch, None).hidden_TH
    assert sent is not None
    return sent


@pytest.mark.parametrize(("number_format", "wire"), FORMATS)
@pytest.mark.parametrize("name", ["llama-odd-sizes", "mistral"])
def test_what_is_replayed_is_what_was_sent(
    name: str, number_format: str, wire: str, open_model: OpenOne
) -> None:
    chain = open_model(name).chain(
        num_stages=3, number_format=number_format, wire=wire, keeps_log=True
    )
    for slot in (0, 5):
        chain.start(slot, GREEDY)
    ours = [send(chain, [Run(5, SEQUENCE[:37], num_samples=0)])]
    both = send(chain, [Run(0, SEQUENCE[::-1][:20], num_samples=0), Run(5, [3])])
    theirs, ours = both[:20], [*ours, both[20:]]
    ours.append(send(chain, [Run(5, [8, 9], num_samples=0)]))
    again = replay(chain.engines[1], [5, 0], [3, 15], [37, 5])
    for slot in (0, 5):
        chain.end(slot)
    expected = np.concatenate([np.concatenate(ours)[3:40], theirs[15:]])
    assert again.dtype == expected.dtype
    assert again.flags.c_contiguous
    assert again.tobytes() == expected.tobytes()


def test_rows_of_shared_blocks_can_be_replayed_by_all_who_share_them(open_model: OpenOne) -> None:
    chain = open_model("mistral").chain(num_stages=3, keeps_log=True)
    chain.start(0, GREEDY)
    sent = send(chain, [Run(0, SEQUENCE[:40], num_samples=0)])
    chain.start(5, GREEDY, like_slot=0, num_cached=32)
    chain.end(0)
    send(chain, [Run(5, [1, 2, 3], num_samples=0)])
    again = replay(chain.engines[1], [5], [0], [32])
    chain.end(5)
    assert again.tobytes() == sent[:32].tobytes()


def test_rows_computed_anew_after_a_rewind_take_the_place_of_the_others(
    open_model: OpenOne,
) -> None:
    chain = open_model("mistral").chain(num_stages=3, keeps_log=True)
    chain.start(0, GREEDY)
    before = send(chain, [Run(0, SEQUENCE[:20], num_samples=0)])
    for engine in chain.engines:
        engine.apply(SequenceUpdates(rewind_slots=(0,), rewind_positions=(10,)))
    after = send(chain, [Run(0, [1, 2, 3], num_samples=0, first=10)])
    again = replay(chain.engines[1], [0], [0], [13])
    chain.end(0)
    assert again.tobytes() == np.concatenate([before[:10], after]).tobytes()


def test_a_replay_changes_nothing(open_model: OpenOne) -> None:
    engine = logging_engine(open_model)
    for _ in range(2):
        replay(engine, [0], [2], [7])
    assert engine.step(make_batch([0], [20], [1]), None).hidden_TH is not None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batch([0], [15], [6]), "not computed"),
        (make_batch([0], [-1], [2]), "not computed"),
        (make_batch([1], [0], [1]), "not computed"),
        (make_batch([2], [0], [1]), "not live"),
        (make_batch([0, 0], [0, 3], [1, 1]), "twice"),
        (make_batch([0], [0], [0]), "without rows"),
        (make_batch([], [], []), "without runs"),
    ],
)
def test_what_was_never_sent_cannot_be_replayed(
    batch: MicroBatch, message: str, open_model: OpenOne
) -> None:
    engine = logging_engine(open_model)
    with pytest.raises(ProtocolViolation, match=message):
        engine.step(replace(batch, replays=True), None)


def test_what_was_rewound_cannot_be_replayed(open_model: OpenOne) -> None:
    engine = logging_engine(open_model)
    rewind = SequenceUpdates(rewind_slots=(0,), rewind_positions=(8,))
    batch = replace(make_batch([0], [0], [9], updates=rewind), replays=True)
    with pytest.raises(ProtocolViolation, match="not computed"):
        engine.step(batch, None)
    assert len(replay(engine, [0], [0], [8])) == 8


@pytest.mark.parametrize("keeps_log", [True, False])
def test_without_a_log_nothing_is_replayed(keeps_log: bool, open_model: OpenOne) -> None:
    """Nor by a last stage, which has none whatever the settings say."""
    settings = replace(SETTINGS, keeps_log=keeps_log)
    engine = build(open_model("llama"), 2 if keeps_log else 0, 4 if keeps_log else 2, settings)
    with pytest.raises(ProtocolViolation, match="no log"):
        engine.step(replace(make_batch([0], [0], [1]), replays=True), None)


def test_the_log_counts_as_cache(open_model: OpenOne) -> None:
    model = open_model("llama")
    settings = replace(SETTINGS, number_format="bf16", keeps_log=True)
    sizes = {
        (wire, end): build(model, end - 2, end, replace(settings, wire=wire)).kv_block_bytes
        for wire in ("f32", "bf16", "int8")
        for end in (2, 4)
    }
    # Keys and values of 2 layers, 16 positions, 2 heads of 16 elements of 2 bytes.
    without = 2 * 2 * 16 * 2 * 16 * 2
    assert sizes["f32", 4] == sizes["bf16", 4] == sizes["int8", 4] == without
    assert sizes["f32", 2] == without + 16 * 64 * 4
    assert sizes["bf16", 2] == without + 16 * 64 * 2
    assert sizes["int8", 2] == without + 16 * (64 + 2 * 2)


def logging_engine(open_model: OpenOne) -> Engine:
    """A first stage with a sequence of 20 positions in slot 0 and an empty one in slot 1."""
    engine = build(open_model("llama"), 0, 2, replace(SETTINGS, keeps_log=True))
    engine.apply(
        SequenceUpdates(starts=(start(0), start(1)), block_slots=(0, 1, 0), block_ids=(5, 0, 7))
    )
    engine.step(make_batch([0], [0], [20]), None)
    return engine
