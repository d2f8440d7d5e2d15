"""What an engine refuses, and that it goes on afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.engine.engine import Engine, EngineSettings, kv_bytes_per_block
from core.errors import InvalidInput, ProtocolViolation
from core.pipeline.batch import MicroBatch, SequenceStart, SequenceUpdates
from core.pipeline.plan import StageSlice
from core.sampling.parameters import SamplingParameters
from tests.core.engine.conftest import OpenModel

OpenOne = Callable[[str], OpenModel]
GREEDY = SamplingParameters(max_tokens=4, temperature=0.0)
SETTINGS = EngineSettings("fp32", num_kv_blocks=8, num_slots=4, max_rows=40, context_length=100)


def start(slot: int, *, num_cached: int = 0) -> SequenceStart:
    return SequenceStart(
        slot=slot, request_id=slot, sampling=GREEDY, num_cached_positions=num_cached
    )


def make_batch(
    slots: list[int],
    firsts: list[int],
    counts: list[int],
    *,
    token_ids: list[int] | None = None,
    updates: SequenceUpdates | None = None,
) -> MicroBatch:
    return MicroBatch(
        id=1,
        slots_R=np.array(slots, np.int32),
        first_positions_R=np.array(firsts, np.int32),
        num_rows_R=np.array(counts, np.int32),
        num_samples_R=np.ones(len(slots), np.int32),
        token_ids_T=np.array([1] * sum(counts) if token_ids is None else token_ids, np.int32),
        updates=updates or SequenceUpdates(),
    )


def build(
    model: OpenModel, first: int, end: int, engine_settings: EngineSettings = SETTINGS
) -> Engine:
    stage_slice = StageSlice(first_layer=first, end_layer=end, num_layers=model.config.num_layers)
    return Engine(model.checkpoint, model.config, stage_slice, engine_settings)


@pytest.fixture
def engine(open_model: OpenOne) -> Engine:
    """The whole model, with sequences of 20 positions in slot 0 and none in slot 1."""
    engine = build(open_model("llama"), 0, 4)
    engine.apply(
        SequenceUpdates(starts=(start(0), start(1)), block_slots=(0, 1, 0), block_ids=(5, 0, 7))
    )
    engine.step(make_batch([0], [0], [20]), None)
    return engine


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batch([2], [0], [1]), "not live"),
        (make_batch([4], [0], [1]), "below 4"),
        (make_batch([-1], [0], [1]), "below 4"),
        (make_batch([1, 1], [0, 1], [1, 1]), "twice"),
        (make_batch([0], [19], [1]), "go on at"),
        (make_batch([0], [21], [1]), "go on at"),
        (make_batch([1], [-1], [1]), "go on at"),
        (make_batch([1], [0], [17]), "no KV block"),
        (make_batch([0, 1], [20, 0], [0, 1]), "without rows"),
        (make_batch([0], [20], [-3], token_ids=[]), "without rows"),
        (make_batch([0], [20], [41]), "at most 40 rows"),
        (make_batch([], [], []), "without runs"),
        (make_batch([0], [20], [1], token_ids=[272]), "token id"),
        (make_batch([0], [20], [1], token_ids=[-1]), "token id"),
        (make_batch([0], [20], [1], token_ids=[1, 2]), "token ids"),
        (replace(make_batch([0], [20], [1]), num_samples_R=np.ones(2, np.int32)), "number"),
        (replace(make_batch([0], [20], [1]), num_rows_R=np.ones(1)), "not integers"),
        (replace(make_batch([0], [20], [1]), num_samples_R=np.full(1, 2)), "or fewer"),
        (replace(make_batch([0], [20], [1]), num_samples_R=np.full(1, -1)), "or fewer"),
        (replace(make_batch([0], [20], [1]), slots_R=np.zeros((1, 1), np.int32)), "number"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_changes_nothing(
    engine: Engine, batch: MicroBatch, message: str
) -> None:
    with pytest.raises(ProtocolViolation, match=message):
        engine.step(batch, None)
    sampled = engine.step(make_batch([0, 1], [20, 0], [1, 3]), None).sampled
    assert sampled is not None
    assert len(sampled.token_ids) == 2


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (SequenceUpdates(ended_slots=(2,)), "not live"),
        (SequenceUpdates(ended_slots=(4,)), "below 4"),
        (SequenceUpdates(ended_slots=(0, 0)), "twice"),
        (SequenceUpdates(starts=(start(0),)), "live slot"),
        (SequenceUpdates(starts=(start(2), start(2))), "twice"),
        (SequenceUpdates(starts=(start(9),)), "below 4"),
        (SequenceUpdates(block_slots=(2,), block_ids=(1,)), "not live"),
        (SequenceUpdates(block_slots=(9,), block_ids=(1,)), "below 4"),
        (SequenceUpdates(block_slots=(0,), block_ids=(8,)), "below 8"),
        (SequenceUpdates(block_slots=(0,), block_ids=(-1,)), "below 8"),
        (SequenceUpdates(block_slots=(0,), block_ids=()), "length"),
        (SequenceUpdates(block_slots=(0,) * 6, block_ids=(1,) * 6), "more than 7 blocks"),
        (SequenceUpdates(ended_slots=(1,), block_slots=(1,), block_ids=(1,)), "not live"),
        (SequenceUpdates(starts=(start(2, num_cached=16),)), "no KV block"),
        (
            SequenceUpdates(starts=(start(2, num_cached=32),), block_slots=(2,), block_ids=(5,)),
            "no KV block",
        ),
        (
            SequenceUpdates(starts=(start(2, num_cached=15),), block_slots=(2,), block_ids=(5,)),
            "whole blocks",
        ),
        (SequenceUpdates(starts=(start(2, num_cached=-16),)), "whole blocks"),
        (SequenceUpdates(rewind_slots=(2,), rewind_positions=(0,)), "not live"),
        (SequenceUpdates(rewind_slots=(9,), rewind_positions=(0,)), "below 4"),
        (SequenceUpdates(rewind_slots=(0, 0), rewind_positions=(9, 8)), "twice"),
        (SequenceUpdates(rewind_slots=(0,), rewind_positions=(-1,)), "first position"),
        (SequenceUpdates(rewind_slots=(0,)), "length"),
        (
            SequenceUpdates(ended_slots=(0,), rewind_slots=(0,), rewind_positions=(9,)),
            "not live",
        ),
        (
            SequenceUpdates(
                starts=(start(2, num_cached=16), start(3)), block_slots=(3,), block_ids=(5,)
            ),
            "no KV block",
        ),
    ],
)
def test_updates_that_do_not_fit_are_refused_and_change_nothing(
    engine: Engine, updates: SequenceUpdates, message: str
) -> None:
    with pytest.raises(ProtocolViolation, match=message):
        engine.apply(updates)
    assert engine.step(make_batch([0, 1], [20, 0], [1, 3]), None).sampled is not None


def test_a_run_goes_back_behind_a_guess_and_no_further(engine: Engine) -> None:
    rows = make_batch([0], [20], [4], token_ids=[1, 2, 3, 4])
    engine.step(replace(rows, num_samples_R=np.full(1, 3)), None)  # 22 and 23 are guesses
    for first in (21, 25):
        with pytest.raises(ProtocolViolation, match="go on at"):
            engine.step(make_batch([0], [first], [1]), None)
    engine.step(make_batch([0], [22], [1]), None)
    for first in (22, 24):
        with pytest.raises(ProtocolViolation, match="go on at"):
            engine.step(make_batch([0], [first], [1]), None)
    assert engine.step(make_batch([0], [23], [1]), None).sampled is not None


def rewind(position: int) -> SequenceUpdates:
    return SequenceUpdates(rewind_slots=(0,), rewind_positions=(position,))


def test_a_rewound_sequence_goes_on_where_it_was_rewound_to(engine: Engine) -> None:
    with pytest.raises(ProtocolViolation, match="go on at"):
        engine.step(make_batch([0], [9], [1]), None)
    with pytest.raises(ProtocolViolation, match="go on at"):
        engine.step(make_batch([0], [20], [1], updates=rewind(9)), None)
    assert engine.step(make_batch([0], [9], [12]), None).sampled is not None


def test_what_a_sequence_has_not_computed_it_need_not_forget(engine: Engine) -> None:
    for position in (20, 21, 2**31):
        engine.apply(rewind(position))
    assert engine.step(make_batch([0], [20], [1]), None).sampled is not None


def test_a_rewind_forgets_the_guesses_behind_it_alone(engine: Engine) -> None:
    guessing = replace(make_batch([0], [20], [4]), num_samples_R=np.full(1, 3))
    engine.step(guessing, None)  # 22 and 23 are guesses
    engine.apply(rewind(23))
    with pytest.raises(ProtocolViolation, match="go on at"):
        engine.step(make_batch([0], [24], [1]), None)
    assert engine.step(make_batch([0], [22], [1]), None).sampled is not None


def test_guesses_are_refused_where_penalties_count_tokens(engine: Engine) -> None:
    penalised = replace(GREEDY, presence_penalty=1.0)
    begin = SequenceStart(slot=2, request_id=2, sampling=penalised, known_token_ids=(1, 2))
    engine.apply(SequenceUpdates(starts=(begin,), block_slots=(2,), block_ids=(1,)))
    guessing = replace(make_batch([2], [0], [2]), num_samples_R=np.full(1, 2))
    with pytest.raises(ProtocolViolation, match="penalties"):
        engine.step(guessing, None)
    assert engine.step(make_batch([2], [0], [2]), None).sampled is not None


def test_a_slot_can_end_and_start_again_in_one_update(engine: Engine) -> None:
    updates = SequenceUpdates(
        ended_slots=(0,), starts=(start(0),), block_slots=(0,), block_ids=(3,)
    )
    result = engine.step(make_batch([0], [0], [16], updates=updates), None)
    assert result.sampled is not None
    with pytest.raises(ProtocolViolation, match="no KV block"):
        engine.step(make_batch([0], [16], [1]), None)


def test_a_sequence_goes_on_after_the_positions_that_another_one_computed(engine: Engine) -> None:
    updates = SequenceUpdates(
        starts=(start(2, num_cached=16),), block_slots=(2, 2), block_ids=(5, 3)
    )
    with pytest.raises(ProtocolViolation, match="go on at"):
        engine.step(make_batch([2], [0], [1], updates=updates), None)
    assert engine.step(make_batch([2], [16], [4]), None).sampled is not None


@pytest.mark.parametrize(
    "hidden",
    [
        None,
        np.zeros((1, 64), np.float32),
        np.zeros((2, 63), np.float32),
        np.zeros((2, 64), np.uint16),
        np.zeros((2, 64), np.float64),
    ],
)
def test_activations_that_do_not_fit_are_refused(open_model: OpenOne, hidden: Any) -> None:
    engine = build(open_model("llama"), 1, 2)
    updates = SequenceUpdates(starts=(start(0),), block_slots=(0,), block_ids=(0,))
    batch = make_batch([0], [0], [2], updates=updates)
    with pytest.raises(ProtocolViolation, match="activations"):
        engine.step(batch, hidden)


def test_a_token_needs_sampling_parameters(open_model: OpenOne) -> None:
    engine = build(open_model("llama"), 0, 4)
    unsampled = SequenceStart(slot=0, request_id=0)
    updates = SequenceUpdates(starts=(unsampled,), block_slots=(0,), block_ids=(0,))
    with pytest.raises(ProtocolViolation, match="sampling"):
        engine.step(make_batch([0], [0], [2], updates=updates), None)


def test_a_middle_stage_holds_its_layers_alone_and_says_what_it_takes(
    open_model: OpenOne,
) -> None:
    model = open_model("llama")
    whole, middle = build(model, 0, 4), build(model, 1, 3)
    assert middle.weights_bytes < 0.6 * whole.weights_bytes
    assert middle.kv_block_bytes == whole.kv_block_bytes // 2
    # Keys and values of 2 layers, 16 positions, 2 heads of 16 float32 elements.
    assert middle.kv_block_bytes == 2 * 2 * 16 * 2 * 16 * 4
    stage_slice = StageSlice(first_layer=1, end_layer=3, num_layers=4)
    narrow = replace(SETTINGS, number_format="bf16")
    assert kv_bytes_per_block(model.config, stage_slice, narrow) == middle.kv_block_bytes // 2
    assert (middle.codec, middle.kv_block_size) == ("f32", 16)
    assert middle.fingerprint == whole.fingerprint
    with pytest.raises(InvalidInput, match="last stage"):
        middle.logits(make_batch([0], [0], [1]), None)


@pytest.mark.parametrize(("first", "end"), [(2, 2), (3, 2), (-1, 2), (0, 5)])
def test_layers_that_the_model_lacks_are_refused(open_model: OpenOne, first: int, end: int) -> None:
    with pytest.raises(InvalidInput, match="layers"):
        build(open_model("llama"), first, end)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("number_format", "fp64"),
        ("wire", "bf16"),  # narrower than fp32 weights
        ("num_kv_blocks", 0),
        ("num_slots", -1),
        ("max_rows", 0),
        ("context_length", 0),
    ],
)
def test_settings_that_make_no_sense_are_refused(option: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=option):
        replace(SETTINGS, **{option: value})


def test_a_token_that_is_drawn_again_after_a_rewind_does_not_count_itself(engine: Engine) -> None:
    penalised = replace(GREEDY, presence_penalty=100.0)
    begin = SequenceStart(slot=2, request_id=2, sampling=penalised, known_token_ids=(1, 2))
    engine.apply(SequenceUpdates(starts=(begin,), block_slots=(2,), block_ids=(1,)))
    usual = engine.step(make_batch([2], [0], [2]), None).sampled
    again = SequenceUpdates(rewind_slots=(2,), rewind_positions=(0,))
    assert usual is not None
    repeated = engine.step(make_batch([2], [0], [2], updates=again), None).sampled
    assert repeated is not None
    assert repeated.token_ids == usual.token_ids


def test_a_batch_may_be_prepared_before_its_step(engine: Engine) -> None:
    batch = make_batch([0, 1], [20, 0], [1, 3])
    engine.prepare(batch)
    prepared = engine.step(batch, None).sampled
    back = SequenceUpdates(rewind_slots=(0, 1), rewind_positions=(20, 0))
    assert engine.step(replace(batch, updates=back), None).sampled == prepared


def test_one_that_is_prepared_and_not_computed_leaves_its_updates_alone(engine: Engine) -> None:
    batch = make_batch([0], [20], [1])
    expected = engine.step(batch, None).sampled
    engine.prepare(make_batch([2], [0], [1], updates=begin(2, block=3)))
    engine.apply(rewind(20))
    assert engine.step(batch, None).sampled == expected
    assert engine.step(make_batch([2], [0], [1]), None).sampled is not None
    with pytest.raises(ProtocolViolation, match="live slot"):
        engine.prepare(make_batch([2], [1], [1], updates=begin(2, block=3)))


def begin(slot: int, *, block: int) -> SequenceUpdates:
    return SequenceUpdates(starts=(start(slot),), block_slots=(slot,), block_ids=(block,))
