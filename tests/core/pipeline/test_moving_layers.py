"""Layers move between stages while sequences run: nobody is lost, and no answer changes."""

from __future__ import annotations

import pytest

from core.errors import InvalidInput, Unavailable
from core.pipeline.batch_time import Coefficients
from core.pipeline.cut import Cut, Part, find_cut
from core.pipeline.events import CutChosen, ReplicaDraining, Tick
from core.pipeline.simulate import (
    SimulatedRecut,
    SimulatedRequest,
    SimulationReport,
    SimulationSettings,
    simulate,
)
from tests.support.exact_pipeline import ExactPipeline

PROMPT = list(range(100, 122))
LAYER = Coefficients(5e-4, 4e-5, 2e-8)


def layers(count: int) -> Coefficients:
    return Coefficients(*(count * seconds for seconds in LAYER))


def part(first_layer: int, end_layer: int, weights: str = "") -> Part:
    return Part(first_layer, (weights,) * (end_layer - first_layer))


OLD = Cut((part(0, 2), part(2, 4)))
FINER = Cut((part(0, 2), part(2, 3), part(3, 4)))  # its first part is the old one's
OTHER = Cut((part(0, 1), part(1, 4)))
WHOLE = Cut((part(0, 4),))


def generating(num_requests: int = 3) -> ExactPipeline:
    """Two stages of two layers, with requests that have generated some of their 20 tokens."""
    pipeline = ExactPipeline(1, 1, num_layers_S=(2, 2))
    for number in range(num_requests):
        pipeline.ask([*PROMPT, number], max_tokens=20)
    while not all(len(asked.output) > 2 for asked in pipeline.asked.values()):
        pipeline.turn()
    return pipeline


def open_new(pipeline: ExactPipeline, cut: Cut) -> list[int]:
    """Opens replicas of those parts that nobody has."""
    held = {replica.part for replica in pipeline.replicas}
    return [pipeline.open_part(one) for one in cut.parts if one not in held]


def leave(pipeline: ExactPipeline, cut: Cut, *, moves: bool) -> list[int]:
    """Lets all go that are not of a cut."""
    leaving = [replica.id for replica in pipeline.replicas if replica.part not in cut.parts]
    for replica_id in leaving:
        pipeline.handle(ReplicaDraining(replica_id=replica_id, moves=moves))
    return leaving


def recut(pipeline: ExactPipeline, cut: Cut, *, moves: bool) -> list[int]:
    open_new(pipeline, cut)
    pipeline.handle(CutChosen(cut=cut))
    return leave(pipeline, cut, moves=moves)


@pytest.mark.parametrize("cut", [FINER, OTHER, WHOLE])
@pytest.mark.parametrize("moves", [False, True])
def test_running_sequences_move_or_end_where_they_are_and_new_ones_take_the_new_cut(
    cut: Cut, moves: bool
) -> None:
    pipeline = generating()
    leaving = recut(pipeline, cut, moves=moves)
    pipeline.ask([7, 8, 9], max_tokens=20)
    num_before = len(pipeline.batches)
    pipeline.finish()
    assert pipeline.answers() == [True] * 4
    assert all(pipeline.scheduler.is_drained(replica_id) for replica_id in leaving)
    assert (pipeline.scheduler.num_failovers == 3) == moves
    lengths = {len(batch.path) for batch in pipeline.batches[num_before:] if not batch.replays}
    assert len(cut.parts) in lengths
    assert all(replica.engine.sequences == {} for replica in pipeline.replicas)


def test_what_a_part_of_both_cuts_has_computed_is_not_computed_again() -> None:
    pipeline = generating()
    (shared,) = [replica for replica in pipeline.replicas if replica.part in FINER.parts]
    recut(pipeline, FINER, moves=True)
    pipeline.finish()
    assert pipeline.answers() == [True] * 3
    computed = [
        batch for batch in pipeline.batches if batch.path[0] == shared.id and not batch.replays
    ]
    # The first prompt, what the others do not share with it, and 19 tokens of each.
    assert sum(sum(batch.num_rows_R) for batch in computed) == 23 + 2 * 3 + 3 * 19
    assert pipeline.exact.num_replayed > 0


def test_a_new_cut_is_taken_by_nobody_but_probes_before_it_is_chosen() -> None:
    pipeline = generating()
    new = open_new(pipeline, FINER)
    pipeline.ask([1, 2, 3], max_tokens=3)
    probe = pipeline.ask([4, 5, 6], max_tokens=3, probed=FINER)
    pipeline.finish()
    assert pipeline.answers() == [True] * 5
    probed = [batch for batch in pipeline.batches if set(batch.path) & set(new)]
    assert sum(batch.num_samples_R[0] for batch in probed) == 3
    assert pipeline.asked[probe].output


def test_a_stranded_sequence_does_not_take_a_cut_that_is_not_chosen() -> None:
    pipeline = generating()
    new = open_new(pipeline, FINER)
    pipeline.kill(pipeline.of_stage(1)[0])
    pipeline.finish()
    assert pipeline.open_requests
    pipeline.open(1)
    pipeline.finish()
    assert pipeline.answers() == [True] * 3
    assert all(not set(batch.path) & set(new) for batch in pipeline.batches)


def test_a_probe_of_a_cut_does_not_go_on_over_another_one() -> None:
    pipeline = generating(num_requests=0)
    new = open_new(pipeline, FINER)
    pipeline.ask(PROMPT, max_tokens=20, probed=FINER)
    for _ in range(9):
        pipeline.turn()
    pipeline.kill(new[0])
    pipeline.finish()
    assert pipeline.open_requests == [0]


def test_a_probe_of_replicas_that_are_gone_is_refused() -> None:
    pipeline = generating(num_requests=0)
    pipeline.ask(PROMPT, probed=FINER)
    assert isinstance(pipeline.asked[0].ends[0], Unavailable)


@pytest.mark.parametrize("number", [0, 1])
def test_what_begun_on_a_new_cut_that_fails_goes_back_to_the_old_one(number: int) -> None:
    """A rollback after new sequences, and moved ones, were on the new cut."""
    pipeline = generating()
    new = open_new(pipeline, FINER)
    pipeline.handle(CutChosen(cut=FINER))
    pipeline.ask([7, 8, 9], max_tokens=20)
    for _ in range(9):
        pipeline.turn()
    pipeline.kill(new[number])
    pipeline.handle(CutChosen(cut=OLD))
    leave(pipeline, OLD, moves=True)
    pipeline.finish()
    assert pipeline.answers() == [True] * 4
    assert all(pipeline.scheduler.is_drained(replica_id) for replica_id in new)


def test_an_old_replica_that_dies_while_it_drains_hands_its_sequences_to_the_new_cut() -> None:
    pipeline = generating()
    leaving = recut(pipeline, OTHER, moves=False)
    pipeline.kill(leaving[0])
    pipeline.finish()
    assert pipeline.answers() == [True] * 3


def test_while_the_chosen_cut_is_away_begun_sequences_go_on_over_the_old_one() -> None:
    pipeline = generating()
    recut(pipeline, OTHER, moves=False)
    for replica_id in [r.id for r in pipeline.replicas if r.part in OTHER.parts]:
        pipeline.kill(replica_id)
    pipeline.ask([7, 8, 9], max_tokens=4)
    pipeline.finish()
    assert pipeline.open_requests == [3]
    open_new(pipeline, OTHER)
    pipeline.finish()
    assert pipeline.answers() == [True] * 4


def test_a_cut_with_other_weights_takes_over_no_sequence() -> None:
    pipeline = generating()
    tuned = Cut((part(0, 2), part(2, 3), part(3, 4, "tuned")))
    leaving = recut(pipeline, tuned, moves=True)
    pipeline.ask([7, 8, 9], max_tokens=4)
    pipeline.finish()
    assert pipeline.answers() == [True] * 4
    assert pipeline.scheduler.num_failovers == 0
    assert all(pipeline.scheduler.is_drained(replica_id) for replica_id in leaving)


def test_requests_without_any_cut_are_given_up_after_the_limit() -> None:
    pipeline = generating()
    leaving = recut(pipeline, WHOLE, moves=False)
    for replica in pipeline.replicas:
        pipeline.kill(replica.id)
    pipeline.now_s += 1e10
    pipeline.handle(Tick())
    assert len(leaving) == 2
    assert all(isinstance(asked.ends[0], Unavailable) for asked in pipeline.asked.values())


def test_prompts_are_found_by_what_the_other_cut_computed() -> None:
    pipeline = generating(num_requests=1)
    pipeline.finish()
    (shared,) = [replica.id for replica in pipeline.replicas if replica.part == part(0, 2)]
    recut(pipeline, FINER, moves=True)
    pipeline.ask([*PROMPT, 1], max_tokens=3)
    pipeline.finish()
    pipeline.ask([*PROMPT, 2], max_tokens=3)
    pipeline.finish()
    assert pipeline.answers() == [True] * 3
    usage = pipeline.asked[2].usage
    assert usage is not None
    assert usage.cached_tokens == 20
    assert pipeline.batches[-1].path[0] == shared


def test_layers_that_leave_a_gap_are_no_cut() -> None:
    with pytest.raises(InvalidInput, match="join up"):
        Cut((part(0, 2), part(3, 4)))
    with pytest.raises(InvalidInput, match="join up"):
        Cut(())
    assert find_cut([part(0, 2), part(3, 4)], num_layers=4) is None
    assert find_cut([part(2, 4), part(0, 2), part(0, 1)], num_layers=4) == OLD
    assert OLD.with_part(part(2, 4, "new")) == Cut((part(0, 2), part(2, 4, "new")))
    assert OLD.with_part(part(2, 3, "new")) is None
    assert FINER.weights == OLD.weights
    assert OLD.at("0:2,2:3,3:4") == FINER
    assert FINER.split == "0:2,2:3,3:4"
    with pytest.raises(InvalidInput, match="split"):
        OLD.at("0:2,2:5")


@pytest.mark.parametrize(
    ("moves", "gain", "longest_gap_s"), [(False, 1.15, 0.2), (True, 1.05, 1.0)]
)
def test_a_third_stage_under_load_raises_throughput_and_every_request_ends(
    moves: bool, gain: float, longest_gap_s: float
) -> None:
    """Who moves is computed again, and pauses for as long as that takes."""

    def served(recut: SimulatedRecut | None) -> SimulationReport:
        requests = [
            SimulatedRequest(arrival_s=0.005 * n, num_prompt=60, num_output=150) for n in range(256)
        ]
        settings = SimulationSettings(
            stages=(layers(3),) * 2, num_layers_S=(3, 3), recut=recut, num_slots=64, hop_s=2e-4
        )
        report = simulate(requests, settings)
        assert report.num_ended == len(report.time_to_first_token_s) == 256
        return report

    recut = SimulatedRecut(at_s=0.8, stages=(layers(2),) * 3, num_layers_S=(2, 2, 2), moves=moves)
    two, three = served(None), served(recut)
    assert three.tokens_per_second > gain * two.tokens_per_second
    assert three.longest_gap_s < longest_gap_s
    assert three.num_failovers == (64 if moves else 0)
