"""Texts that take too long to tokenise: whoever sends one is told so, and others are served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from penstock.v1 import generation_pb2 as pb
from penstock.v1 import generation_pb2_grpc

from core.errors import CorruptWeights, InvalidInput, Unavailable
from core.tokens.hugging_face_vocabulary import read_hugging_face_vocabulary
from core.tokens.tokenizer import Tokenizer
from services.common.channels import open_channel
from services.common.telemetry import no_telemetry
from services.gateway.encoding_threads import EncodingThreads
from services.gateway.gateway import Gateway
from services.gateway.settings import GatewaySettings
from tests.services.gateway.conftest import NOT_SERVING, SERVING, wait_for_health
from tests.support.fake_coordinator import FakeCoordinator
from tests.support.tiny_tokenizer import write_tiny_tokenizer

SOON_S = 0.05
Open = Callable[..., EncodingThreads]


class Stuck:
    """Work that goes on until `end`."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def __call__(self) -> list[int]:
        self._ended.wait()
        return [1]

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def end(self) -> None:
        self._ended.set()


@pytest.fixture
def open_threads() -> Iterator[Open]:
    opened = []

    def open_them(**settings: Any) -> EncodingThreads:
        opened.append(EncodingThreads(**settings))
        return opened[-1]

    yield open_them
    for threads in opened:
        threads.close()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    work = Stuck()
    yield work
    work.end()


def failing() -> list[int]:
    raise CorruptWeights("it fails")


async def test_what_the_work_returns_or_raises_reaches_whoever_waits(open_threads: Open) -> None:
    threads = open_threads()
    assert await threads.run("prompt", lambda: [1, 2]) == [1, 2]
    with pytest.raises(CorruptWeights, match="it fails"):
        await threads.run("prompt", failing)


async def test_a_text_that_takes_too_long_is_refused_and_others_are_not(
    open_threads: Open, stuck: Stuck
) -> None:
    threads = open_threads(num_threads=2, limit_s=SOON_S)
    with pytest.raises(InvalidInput, match="messages is 'too hard to tokenise'"):
        await threads.run("messages", stuck)
    assert await threads.run("prompt", lambda: [7]) == [7]


async def test_no_more_texts_than_threads_are_tokenised_at_a_time(
    open_threads: Open, stuck: Stuck
) -> None:
    threads = open_threads(num_threads=1)
    first = asyncio.create_task(threads.run("prompt", stuck))
    second = asyncio.create_task(threads.run("prompt", lambda: [int(stuck.has_ended)]))
    await asyncio.wait([first, second], timeout=SOON_S)
    stuck.end()
    assert [await first, await second] == [[1], [True]]


async def test_a_request_that_leaves_does_not_free_its_thread(
    open_threads: Open, stuck: Stuck
) -> None:
    threads = open_threads(num_threads=1, limit_s=SOON_S)
    leaving = asyncio.create_task(threads.run("prompt", stuck))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait_for(threads.wait_until_all_hang(), 30)


async def test_a_thread_that_ends_late_is_as_good_as_new(open_threads: Open, stuck: Stuck) -> None:
    threads = open_threads(num_threads=2, limit_s=SOON_S)
    all_hang = asyncio.create_task(threads.wait_until_all_hang())
    for work in (stuck, still := Stuck()):
        with pytest.raises(InvalidInput):
            await threads.run("prompt", work)
        stuck.end()
        assert await threads.run("prompt", lambda: [7]) == [7]
    assert not all_hang.done()
    all_hang.cancel()
    still.end()


class StuckTokenizer(Tokenizer):
    """Encodes for as long as the work takes."""

    def __init__(self, folder: Path, work: Stuck) -> None:
        super().__init__(read_hugging_face_vocabulary(folder))
        self._work = work

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return self._work()


async def test_a_gateway_that_can_tokenise_nothing_turns_red_and_ends(
    tmp_path: Path, open_threads: Open, stuck: Stuck
) -> None:
    tokenizer = StuckTokenizer(write_tiny_tokenizer(tmp_path), stuck)
    coordinator = FakeCoordinator()
    settings = GatewaySettings(
        coordinators=(f"127.0.0.1:{await coordinator.start()}",),
        model=tmp_path,
        listen="127.0.0.1:0",
    )
    threads = open_threads(num_threads=1, limit_s=SOON_S)
    gateway = Gateway(settings, tokenizer, no_telemetry(), threads=threads)
    async with open_channel(f"127.0.0.1:{await gateway.start()}") as channel:
        running = asyncio.create_task(gateway.run())
        await wait_for_health(channel, SERVING)
        turning_red = asyncio.create_task(wait_for_health(channel, NOT_SERVING))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="too hard to tokenise"):
            await stub.Generate(pb.GenerateRequest(prompt="a"), timeout=30).read()
        await turning_red
        with pytest.raises(Unavailable, match="have hung"):
            await running
    await coordinator.stop()
