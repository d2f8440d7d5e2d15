"""Who is admitted next, and whether tenants get their shares."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from core.errors import InvalidInput
from core.pipeline.sequences import Sequence
from core.pipeline.settings import SchedulerSettings
from core.pipeline.waiting import WaitingQueue
from core.sampling.parameters import SamplingParameters


@pytest.fixture
def numbers() -> Iterator[int]:
    return itertools.count()


def request(
    numbers: Iterator[int], tenant: str, *, tokens: int = 10, priority: int = 0
) -> Sequence:
    number = next(numbers)
    return Sequence(
        request_id=number,
        order=number,
        token_ids=[1] * (tokens - 1),
        num_prompt_tokens=tokens - 1,
        sampling=SamplingParameters(max_tokens=1),
        arrived_s=0.0,
        tenant=tenant,
        priority=priority,
    )


def take(queue: WaitingQueue) -> Sequence:
    head = next(iter(queue))
    queue.remove(head)
    return head


def test_one_tenant_is_served_in_order_of_arrival(numbers: Iterator[int]) -> None:
    queue = WaitingQueue()
    requests = [request(numbers, "", tokens=tokens) for tokens in (500, 3, 40, 2)]
    for one in requests:
        queue.add(one)
    assert [take(queue) for _ in requests] == requests
    assert len(queue) == queue.num_rows == 0


def test_a_flood_of_one_tenant_does_not_delay_another(numbers: Iterator[int]) -> None:
    queue = WaitingQueue()
    for _ in range(100):
        queue.add(request(numbers, "flood"))
    for _ in range(10):
        take(queue)
    queue.add(request(numbers, "late"))
    assert "late" in {take(queue).tenant, take(queue).tenant}


def test_tenants_share_tokens_not_requests(numbers: Iterator[int]) -> None:
    queue = WaitingQueue()
    for _ in range(40):
        queue.add(request(numbers, "long", tokens=100))
        for _ in range(10):
            queue.add(request(numbers, "short", tokens=10))
    taken = Counter[str]()
    for _ in range(220):
        one = take(queue)
        taken[one.tenant] += one.num_prompt_tokens + 1
    assert abs(taken["long"] - taken["short"]) <= 100


def test_weights_are_kept(numbers: Iterator[int]) -> None:
    queue = WaitingQueue({"gold": 3.0})
    for _ in range(100):
        queue.add(request(numbers, "gold"))
        queue.add(request(numbers, "plain"))
    taken = Counter(take(queue).tenant for _ in range(80))
    assert abs(taken["gold"] - 60) <= 1


def test_who_was_away_has_nothing_saved(numbers: Iterator[int]) -> None:
    queue = WaitingQueue()
    for _ in range(50):
        queue.add(request(numbers, "busy"))
        take(queue)
    for _ in range(10):
        queue.add(request(numbers, "busy"))
        queue.add(request(numbers, "back"))
    taken = Counter(take(queue).tenant for _ in range(10))
    assert abs(taken["back"] - taken["busy"]) <= 2


def test_a_higher_priority_goes_first_whoever_it_is_of(numbers: Iterator[int]) -> None:
    queue = WaitingQueue({"gold": 100.0})
    queue.add(request(numbers, "gold"))
    urgent = request(numbers, "plain", tokens=1000, priority=1)
    queue.add(urgent)
    assert take(queue) is urgent


def test_who_was_preempted_returns_to_its_place(numbers: Iterator[int]) -> None:
    queue = WaitingQueue()
    requests = [request(numbers, tenant) for tenant in ("a", "b", "a", "b", "a")]
    for one in requests:
        queue.add(one)
    first = take(queue)
    second = take(queue)
    first.token_ids.append(5)
    queue.put_back(second)
    queue.put_back(first)
    assert [take(queue) for _ in range(2)] == [first, second]
    assert queue.num_rows == sum(len(one.token_ids) for one in requests[2:])


def full_of(numbers: Iterator[int], counts: dict[str, int], **weights: float) -> WaitingQueue:
    queue = WaitingQueue(weights)
    for tenant, count in counts.items():
        for _ in range(count):
            queue.add(request(numbers, tenant))
    return queue


def test_the_newest_of_the_tenant_with_most_gives_way(numbers: Iterator[int]) -> None:
    queue = full_of(numbers, {"flood": 6, "some": 3})
    newest_of_flood = 5
    leaves = queue.who_gives_way("new")
    assert leaves is not None
    assert leaves.order == newest_of_flood
    assert queue.who_gives_way("some") is leaves
    assert queue.who_gives_way("flood") is None


def test_nobody_gives_way_to_a_tenant_that_would_have_as_many(numbers: Iterator[int]) -> None:
    queue = full_of(numbers, {"a": 4, "b": 3})
    assert queue.who_gives_way("b") is None


def test_places_are_shared_by_weight(numbers: Iterator[int]) -> None:
    queue = full_of(numbers, {"gold": 6, "plain": 3}, gold=3.0)
    leaves = queue.who_gives_way("gold")
    assert leaves is not None
    assert leaves.tenant == "plain"
    assert queue.who_gives_way("plain") is None


def test_what_has_begun_does_not_give_way(numbers: Iterator[int]) -> None:
    queue = full_of(numbers, {"flood": 3})
    for sequence in list(queue)[1:]:
        sequence.scheduled_s = 1.0
    leaves = queue.who_gives_way("new")
    assert leaves is not None
    assert leaves.order == 0
    leaves.token_ids *= 2  # it came with output
    assert queue.who_gives_way("new") is None


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    with pytest.raises(InvalidInput, match="tenant_weights"):
        SchedulerSettings(tenant_weights={"a": weight})
