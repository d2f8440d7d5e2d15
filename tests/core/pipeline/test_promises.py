"""Blocks are found before they are filled. When they will not be, whoever found them is told.

Two paths share the first stage. Of a prompt on both, that stage's blocks are those that the first
path was to fill, and the other path's second stage has its own.
"""

from __future__ import annotations

from core.pipeline.events import RequestCancelled
from tests.support.exact_pipeline import ExactPipeline

PROMPT = list(range(100, 120))  # five full blocks
LONGER = [*PROMPT, *range(8)]  # and two more


class Promising(ExactPipeline):
    """The second path's request has found what the first path's is about to fill."""

    def __init__(self) -> None:
        super().__init__(1, num_stages=2)
        (self.first,) = self.of_stage(0)
        self.lost = self.open(1, num_kv_blocks=6)  # holds one request
        self.open(1)
        self.filling = self.ask([*PROMPT, 1], max_tokens=4)
        self.ask([*PROMPT, 2], max_tokens=4)
        assert [batch.path[1] for batch in self.batches] == [self.lost, self.lost + 1]
        assert self.batches[1].first_positions_R == [0]

    def lose(self) -> None:
        """The first path is lost, and the first stage hears of it before it computes."""
        self.kill(self.lost)
        while self.exact.replicas[self.first].receive():
            pass

    def num_found(self, request_id: int) -> int:
        """Positions that a request has found at its latest start."""
        return self.scheduler._sequences[request_id].seats[0].num_found


def test_who_found_what_will_not_be_filled_begins_again() -> None:
    pipeline = Promising()
    found = pipeline.ask(LONGER, max_tokens=4)
    assert pipeline.num_found(found) == len(PROMPT)
    pipeline.lose()
    assert pipeline.scheduler.num_preemptions == 1
    pipeline.finish()
    assert pipeline.answers() == [True] * 3


def test_what_is_known_to_be_filled_is_kept() -> None:
    pipeline = Promising()
    found = pipeline.ask(LONGER, max_tokens=4)
    first = pipeline.exact.replicas[pipeline.first]
    while first.receive() or first.step():
        pass
    first.report()
    pipeline.deliver(first)
    pipeline.lose()
    assert pipeline.scheduler.num_preemptions == 0
    assert pipeline.num_found(found) == len(PROMPT)
    pipeline.finish()
    assert pipeline.answers() == [True] * 3


def test_what_was_computed_from_them_is_forgotten_too() -> None:
    """Its request has gone meanwhile, and its own blocks would be found once the first are there
    again."""
    pipeline = Promising()
    gone = pipeline.ask(LONGER, max_tokens=4)
    assert pipeline.num_found(gone) == len(PROMPT)
    pipeline.handle(RequestCancelled(request_id=gone))
    pipeline.lose()
    pipeline.finish()
    pipeline.ask([*LONGER, 1], max_tokens=4)
    pipeline.finish()
    assert pipeline.answers() == [True, True, False, True]


def test_a_token_of_one_that_has_gone_back_to_the_queue_counts_no_more() -> None:
    pipeline = Promising()
    found = pipeline.ask(LONGER, max_tokens=4)
    assert pipeline.scheduler._pipeline is not None
    pipeline.scheduler._pipeline.admission.preempt(pipeline.scheduler._sequences[found])
    pipeline.lose()
    pipeline.finish()
    assert pipeline.answers() == [True] * 3


def test_what_is_restored_is_promised_in_the_same_way() -> None:
    """One finds what is restored for another, and the replica that sends it again is lost."""
    pipeline = ExactPipeline(2, 2)
    pipeline.ask([*PROMPT, 1], max_tokens=20)
    while not pipeline.asked[0].output:
        pipeline.turn()
    sender, lost = pipeline.batches[-1].path
    pipeline.kill(lost)
    pipeline.ask([*PROMPT, 2], max_tokens=4)
    pipeline.kill(sender)
    pipeline.finish()
    assert pipeline.answers() == [True, True]
