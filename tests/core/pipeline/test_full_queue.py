"""What a full queue does with one more request."""

from __future__ import annotations

from core.errors import Exhausted
from core.pipeline.actions import FinishReason
from core.pipeline.settings import SchedulerSettings
from tests.support.exact_pipeline import ExactPipeline

NUM_SLOTS, MAX_WAITING = 4, 6


def make_pipeline() -> ExactPipeline:
    settings = SchedulerSettings(max_waiting=MAX_WAITING, lost_limit_s=1e9)
    return ExactPipeline(1, 1, num_slots=NUM_SLOTS, settings=settings)


def ask_at_once(pipeline: ExactPipeline, count: int, *, tenant: str = "") -> list[int]:
    """Requests that come in one turn of the event loop."""
    events = [pipeline.request([number] * 5, tenant=tenant) for number in range(count)]
    pipeline.handle(*events)
    return [event.request_id for event in events]


def refused(pipeline: ExactPipeline) -> list[int]:
    return [
        request_id
        for request_id, asked in pipeline.asked.items()
        if any(isinstance(end, Exhausted) for end in asked.ends)
    ]


def test_a_burst_is_refused_only_where_no_place_is_left() -> None:
    pipeline = make_pipeline()
    ids = ask_at_once(pipeline, MAX_WAITING + NUM_SLOTS + 3)
    assert refused(pipeline) == ids[-3:]
    pipeline.finish()
    assert [one.ends for one in pipeline.asked.values()][:-3] == [[FinishReason.LENGTH]] * 10


def test_a_tenant_that_fills_the_queue_makes_place_for_another() -> None:
    pipeline = make_pipeline()
    flood = ask_at_once(pipeline, MAX_WAITING + NUM_SLOTS, tenant="flood")
    assert refused(pipeline) == []
    others = ask_at_once(pipeline, MAX_WAITING, tenant="other")
    # Three places each.
    assert refused(pipeline) == [*flood[-3:], *others[-3:]]
    error = pipeline.asked[flood[-1]].ends[0]
    assert isinstance(error, Exhausted)
    assert error.retry_after_s is not None
    pipeline.finish()
    served = [one for one in pipeline.asked.values() if one.ends == [FinishReason.LENGTH]]
    assert len(served) == NUM_SLOTS + MAX_WAITING
