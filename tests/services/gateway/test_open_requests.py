"""Requests that outlive coordinators, without any network: what is read, and what is told."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.v1 import coordinator_pb2

from core.errors import Exhausted, Unavailable
from services.gateway.open_request import OpenRequest
from services.gateway.open_requests import OpenRequests
from tests.support.fake_coordinator import generate, refusal

NUM_REQUESTS, MAX_TOKENS = 3, 5


def make_submission(first: int = 1) -> coordinator_pb2.Submission:
    submission = coordinator_pb2.Submission(token_ids=[first, 2])
    submission.sampling.max_tokens = MAX_TOKENS
    return submission


class Coordinator:
    """Has all its answers ready, a message for each update, and may stop behind any of them."""

    def __init__(self, requests: OpenRequests, *, end_apart: bool) -> None:
        self._requests = requests
        self._end_apart = end_apart
        self._answers: list[coordinator_pb2.ConnectResponse] = []

    def serve(self, num_messages: int | None = None) -> None:
        """Takes what it is told and sends so many messages; None: all that there are."""
        if self._requests.has_news.is_set():
            for submission in self._requests.next_message().submissions:
                for update in generate(submission, end_apart=self._end_apart):
                    update.request_id = submission.request_id
                    message = coordinator_pb2.ConnectResponse(updates=[update])
                    self._answers.append(message)
        for message in self._answers[:num_messages]:
            self._requests.deliver(message)
        del self._answers[:num_messages]


async def read_all(request: OpenRequest) -> list[int]:
    """All tokens, up to the end that the coordinator or the gateway gives it."""
    received: list[int] = []
    while True:
        news = await request.receive()
        received += news.token_ids
        for update in news.updates:
            received += update.token_ids
            if update.finish_reason:
                return received


@settings(deadline=None)
@given(
    losses=st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=6),
    end_apart=st.booleans(),
)
def test_however_often_a_coordinator_is_lost_the_tokens_are_the_same(
    losses: list[tuple[int, bool]], end_apart: bool
) -> None:
    async def run() -> None:
        requests = OpenRequests(resume_limit_s=600.0)
        requests.accept()
        submitted = [requests.submit(make_submission(first)) for first in range(NUM_REQUESTS)]
        reading = [asyncio.create_task(read_all(request)) for request in submitted]
        for num_messages, is_read in losses:
            Coordinator(requests, end_apart=end_apart).serve(num_messages)
            if is_read:
                await asyncio.sleep(0)
            requests.lose(())
            requests.accept()
            requests.resume()
        Coordinator(requests, end_apart=end_apart).serve()
        usual = [list(generate(make_submission(first))) for first in range(NUM_REQUESTS)]
        async with asyncio.timeout(10):
            for task, updates in zip(reading, usual, strict=True):
                expected = [token_id for update in updates for token_id in update.token_ids]
                assert await task == expected
        assert requests.num_open == 0

    asyncio.run(run())


async def test_without_a_coordinator_requests_are_refused_at_once() -> None:
    requests = OpenRequests(resume_limit_s=600.0)
    with pytest.raises(Unavailable):
        requests.submit(make_submission())


async def test_no_more_requests_wait_in_a_gap_than_the_bound() -> None:
    requests = OpenRequests(resume_limit_s=600.0)
    requests.accept()
    requests.lose(())
    for _ in range(1024):
        requests.submit(make_submission())
    with pytest.raises(Exhausted) as caught:
        requests.submit(make_submission())
    assert caught.value.retry_after_s
    requests.give_up()


async def test_a_request_that_waits_to_be_submitted_again_can_be_cancelled() -> None:
    requests = OpenRequests(resume_limit_s=600.0)
    requests.accept()
    request = requests.submit(make_submission())
    requests.next_message()
    requests.lose(())
    requests.resume()
    requests.next_message()
    update = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_s=60)
    update.request_id = request.request_id
    requests.deliver(coordinator_pb2.ConnectResponse(updates=[update]))
    assert request.is_retrying
    request.cancel()
    assert requests.num_open == 0
    assert not requests.has_news.is_set()


async def test_a_cancelled_request_that_loses_its_coordinator_fails() -> None:
    requests = OpenRequests(resume_limit_s=600.0)
    requests.accept()
    request = requests.submit(make_submission())
    request.cancel()
    requests.lose(())
    with pytest.raises(Unavailable):
        await request.receive()
    requests.give_up()


async def test_the_next_coordinator_is_told_with_whose_weights_a_request_began() -> None:
    requests = OpenRequests(resume_limit_s=600.0)
    requests.accept()
    request = requests.submit(make_submission())
    assert not requests.next_message().submissions[0].HasField("began_on")
    began_on = coordinator_pb2.Cut(end_layers=[1], layer_digests=["a"])
    update = coordinator_pb2.RequestUpdate(request_id=request.request_id, began_on=began_on)
    requests.deliver(
        coordinator_pb2.ConnectResponse(
            updates=[update], token_request_ids=[request.request_id], token_ids=[5]
        )
    )
    assert await request.receive() == ([5], [])
    requests.lose([])
    requests.accept()
    requests.resume()
    assert requests.next_message().submissions[0].began_on == began_on
