"""Who is asked for which rate of the trace, and how an OpenAI-style server's answers count."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import httpx2
import pytest

from tests.benchmarks.load import Request, RequestFailed
from tests.benchmarks.peers.openai import count_tokens, encode_openai, openai_answers
from tests.benchmarks.peers.test_comparison import mesh_figures
from tests.benchmarks.peers.trace_contest import ARRIVALS, contest, contest_table
from tests.benchmarks.peers.turns import PeerFailed
from tests.benchmarks.report import Figures
from tests.benchmarks.trace import TracedRequest


@dataclass(kw_only=True)
class PacedBench:
    """Takes so many requests a second, and remembers what it was asked for."""

    requests_per_s: float
    latency_ms: float
    context_length: int = 2048
    starts: int = 0
    asked: list[float] = field(default_factory=list)
    served: list[Sequence[TracedRequest]] = field(default_factory=list)

    async def saturated(self, traced: Sequence[TracedRequest], seconds: float) -> Figures:
        return self._figures(seconds, self.requests_per_s)

    async def arriving(self, traced: Sequence[TracedRequest], *, requests_per_s: float) -> Figures:
        self.asked.append(requests_per_s)
        self.served.append(traced)
        return self._figures(100.0, requests_per_s)

    def _figures(self, seconds: float, rate: float) -> Figures:
        return replace(
            mesh_figures(),
            duration_s=seconds,
            requests=round(rate * seconds),
            ttft_p99_ms=self.latency_ms,
            inter_token_p99_ms=self.latency_ms,
        )

    @asynccontextmanager
    async def server(self) -> AsyncIterator[PacedBench]:
        self.starts += 1
        yield self


async def compete(theirs: PacedBench, ours: PacedBench):
    servers = {"them": theirs.server, "us": ours.server}
    return await contest(servers, ours="us", theirs="them", seconds=100.0, say=lambda _: None)


async def test_each_serves_at_its_own_rate_and_both_at_the_lower() -> None:
    theirs = PacedBench(requests_per_s=1.0, latency_ms=30.0)
    ours = PacedBench(requests_per_s=2.0, latency_ms=20.0)
    result = await compete(theirs, ours)
    assert theirs.asked == [pytest.approx(0.8)]
    assert ours.asked == [pytest.approx(1.6), pytest.approx(0.8)]
    assert theirs.served + ours.served == [theirs.served[0]] * 3
    assert len(theirs.served[0]) == ARRIVALS
    assert result.at_lower_rate["them"] == result.at_own_rate["them"]
    assert [(row.ratio, row.met) for row in result.outcomes()] == [(pytest.approx(2 / 3), True)] * 4
    assert len(list(contest_table(result).columns[0].cells)) == 6


async def test_the_first_gets_another_turn_where_the_second_is_slower() -> None:
    theirs = PacedBench(requests_per_s=3.0, latency_ms=10.0)
    ours = PacedBench(requests_per_s=1.0, latency_ms=20.0)
    result = await compete(theirs, ours)
    assert theirs.asked == [pytest.approx(2.4), pytest.approx(0.8)]
    assert (theirs.starts, ours.starts) == (2, 1)
    assert [row.met for row in result.outcomes()] == [False] * 4


async def test_a_server_that_answers_nothing_fails_the_contest() -> None:
    idle = PacedBench(requests_per_s=0.0, latency_ms=10.0)
    with pytest.raises(PeerFailed, match="no request of the trace ended"):
        await compete(idle, PacedBench(requests_per_s=1.0, latency_ms=1.0))


def event(*token_ids: int) -> str:
    return f"data: {json.dumps({'choices': [{'text': 'x', 'token_ids': list(token_ids)}]})}\n\n"


def request() -> Request:
    message = encode_openai("a-model")([5, 6, 7], 4)
    return Request(message=message, num_prompt_tokens=3, num_new_tokens=4)


async def ask(status: int, *parts: str) -> list[int]:
    """What the answers count when a server sends these parts."""
    seen = []

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part.encode()

    def serve(sent: httpx2.Request) -> httpx2.Response:
        seen.append(json.loads(sent.content))
        return httpx2.Response(status, content=body())

    transport = httpx2.MockTransport(serve)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        counts = [count async for count in openai_answers(client)(request())]
    (asked,) = seen
    assert (asked["prompt"], asked["max_tokens"], asked["ignore_eos"]) == ([5, 6, 7], 4, True)
    return counts


async def test_events_are_counted_however_the_bytes_are_cut() -> None:
    stream = event(1) + event(2, 3) + event() + event(4) + "data: [DONE]\n\n"
    cut = [stream[at : at + 7] for at in range(0, len(stream), 7)]
    assert await ask(200, stream) == await ask(200, *cut) == [1, 2, 0, 1]


async def test_a_refusal_is_an_error_with_its_reason() -> None:
    with pytest.raises(RequestFailed, match="HTTP 400: too long"):
        await ask(400, "too long")


def test_an_error_in_the_stream_is_an_error() -> None:
    with pytest.raises(RequestFailed, match="out of blocks"):
        count_tokens(b'{"error": {"message": "out of blocks"}}')
    assert count_tokens(b'{"choices": [], "usage": {}}') == 0
