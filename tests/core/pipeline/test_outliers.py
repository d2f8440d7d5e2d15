"""A replica that becomes far slower than its siblings rests while they do its work."""

from __future__ import annotations

from core.pipeline.events import StageReported, Tick
from tests.support.exact_pipeline import ExactPipeline

FIXED_S, ROW_S = 0.002, 0.001
REST_S = 10.0


class Timed:
    """A pipeline whose replicas report what they take: as usual, or as is said."""

    def __init__(self, *num_replicas_S: int) -> None:
        self.pipeline = ExactPipeline(*num_replicas_S)
        self.factors: dict[int, float] = {}  # of replicas that are not as usual
        self._num_reported = 0

    def serve(self, *, num_requests: int = 4, max_tokens: int = 40) -> set[int]:
        """Answers requests; who took part in what was launched since they came."""
        pipeline = self.pipeline
        num_before = len(pipeline.batches)
        for number in range(num_requests):
            pipeline.ask([len(pipeline.asked), number] * 5, max_tokens=max_tokens)
        while pipeline.turn():
            self._report()
        assert all(pipeline.answers())
        return {id for batch in pipeline.batches[num_before:] for id in batch.path}

    def _report(self) -> None:
        batches = self.pipeline.batches[self._num_reported :]
        self._num_reported += len(batches)
        for batch in batches:
            for replica_id in batch.path:
                rows = sum(batch.num_rows_R)
                seconds = self.factors.get(replica_id, 1.0) * (FIXED_S + ROW_S * rows)
                self.pipeline.handle(
                    StageReported(replica_id=replica_id, batch_rows=[rows], batch_seconds=[seconds])
                )

    def wait(self, seconds: float) -> None:
        self.pipeline.now_s += seconds
        self.pipeline.handle(Tick())


def test_its_sequences_leave_it_and_no_others_come() -> None:
    timed = Timed(1, 2)
    slow, other = timed.pipeline.of_stage(1)
    assert {slow, other} <= timed.serve()
    timed.factors[slow] = 10.0
    timed.serve(num_requests=6)
    timed.wait(1.0)
    assert timed.pipeline.scheduler.num_failovers > 0
    assert timed.pipeline.scheduler.is_resting(slow)
    assert not timed.pipeline.scheduler.is_resting(other)
    assert slow not in timed.serve()


def test_it_comes_back_after_a_rest_and_rests_longer_where_it_is_still_slow() -> None:
    timed = Timed(1, 2)
    slow, _ = timed.pipeline.of_stage(1)
    timed.serve()
    timed.factors[slow] = 10.0
    for rest_s in (REST_S, 2 * REST_S):
        timed.serve(num_requests=6)
        timed.wait(1.0)
        assert slow not in timed.serve()
        timed.wait(rest_s - 2.0)
        assert slow not in timed.serve()
        timed.wait(2.0)
    timed.factors[slow] = 1.0
    for _ in range(3):
        assert slow in timed.serve()


def test_without_a_sibling_it_goes_on() -> None:
    timed = Timed(1, 1)
    (slow,) = timed.pipeline.of_stage(1)
    timed.serve()
    timed.factors[slow] = 10.0
    timed.serve()
    timed.wait(1.0)
    assert slow in timed.serve()


def test_a_moment_without_its_core_is_no_reason() -> None:
    timed = Timed(1, 2)
    slow, _ = timed.pipeline.of_stage(1)
    timed.serve()
    timed.factors[slow] = 100.0
    timed.serve(num_requests=2, max_tokens=4)
    timed.factors[slow] = 1.0
    timed.serve()
    timed.wait(1.0)
    assert slow in timed.serve()


def test_when_its_sibling_dies_it_takes_over() -> None:
    timed = Timed(1, 2)
    slow, other = timed.pipeline.of_stage(1)
    timed.serve()
    timed.factors[slow] = 10.0
    timed.serve(num_requests=6)
    timed.wait(1.0)
    timed.pipeline.kill(other)
    assert slow in timed.serve()
