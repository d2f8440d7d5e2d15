"""Orders as the contract has them."""

from __future__ import annotations

import pytest
from penstock.v1 import coordinator_pb2

from core.errors import InvalidInput
from core.pipeline.actions import EmitTokens, RunMicroBatch
from core.pipeline.batch import SequenceUpdates
from core.pipeline.cut import Cut, Part
from services.coordinator.messages import cut_from, micro_batch_requests, write_news


def run(path: tuple[int, ...], *, first_stage: int = 0, replays: bool = False) -> RunMicroBatch:
    return RunMicroBatch(
        micro_batch_id=7,
        path=path,
        first_stage=first_stage,
        replays=replays,
        slots_R=[3, 4],
        first_positions_R=[0, 9],
        num_rows_R=[2, 1],
        num_samples_R=[0, 1],
        token_ids_T=[11, 12, 13] if first_stage == 0 and not replays else [],
        updates_P=[
            SequenceUpdates(rewind_slots=(replica,), rewind_positions=(1,)) for replica in path
        ],
    )


def link_id(upstream_id: int, downstream_id: int) -> int:
    return 10 * upstream_id + downstream_id


def test_each_replica_of_the_path_hears_its_links_and_its_own_updates() -> None:
    batches = [r.micro_batch for r in micro_batch_requests(run((1, 2, 5)), link_id)]
    assert [(b.upstream_link, b.downstream_link) for b in batches] == [(0, 12), (12, 25), (25, 0)]
    assert [list(b.token_ids) for b in batches] == [[11, 12, 13], [], []]
    assert [list(b.updates.rewind_slots) for b in batches] == [[1], [2], [5]]
    assert all(list(b.num_rows) == [2, 1] and b.id == 7 and not b.replays for b in batches)


def test_all_replicas_hear_whether_a_micro_batch_is_alone() -> None:
    action = run((1, 2))
    assert not any(r.micro_batch.is_alone for r in micro_batch_requests(action, link_id))
    action.is_alone = True
    assert all(r.micro_batch.is_alone for r in micro_batch_requests(action, link_id))


@pytest.mark.parametrize("first_stage", [0, 1])
def test_a_part_of_the_path_replays_at_its_head_only(first_stage: int) -> None:
    action = run((2, 5), first_stage=first_stage, replays=True)
    batches = [request.micro_batch for request in micro_batch_requests(action, link_id)]
    assert [b.replays for b in batches] == [True, False]
    assert [(b.upstream_link, b.downstream_link) for b in batches] == [(0, 25), (25, 0)]
    assert not any(b.token_ids for b in batches)


def test_a_replica_alone_has_no_links() -> None:
    (request,) = micro_batch_requests(run((4,)), link_id)
    assert (request.micro_batch.upstream_link, request.micro_batch.downstream_link) == (0, 0)


def test_what_a_request_began_on_comes_back_as_it_was() -> None:
    cut = Cut((Part(0, ("a", "b")), Part(2, ("c",))))
    update = coordinator_pb2.RequestUpdate()
    write_news(update, EmitTokens(request_id=1, token_ids=[5], logprobs=[], began_on=cut))
    assert cut_from(update.began_on) == cut
    assert cut_from(coordinator_pb2.Cut()) is None


@pytest.mark.parametrize(
    ("ends", "digests"),
    [([2, 3], "ab"), ([3, 2, 3], "abc"), ([0, 3], "abc"), ([], "a"), ([1], ""), ([2**32 - 1], "a")],
)
def test_what_is_no_cut_is_refused(ends: list[int], digests: str) -> None:
    with pytest.raises(InvalidInput, match="began_on"):
        cut_from(coordinator_pb2.Cut(end_layers=ends, layer_digests=list(digests)))
