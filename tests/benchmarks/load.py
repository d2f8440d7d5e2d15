"""A lean load generator: one process, one channel, little work for each message.

It shares the cores with what it measures, so requests are serialised before the
clock runs, and answers are only counted and timed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
from penstock.v1 import generation_pb2 as pb

from services.common.durations import duration

GENERATE = "/penstock.v1.GenerationService/Generate"
GENERATE_MANY = "/penstock.v1.GenerationService/GenerateMany"
REQUEST_TIMEOUT_S = 600.0
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request, ready to be sent. `at_s` is its arrival in open-loop load."""

    message: bytes
    num_prompt_tokens: int
    num_new_tokens: int
    at_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class Tally:
    """What was seen of all requests, times in seconds of time.monotonic().

    `token_times_s[i]` is when the message with `token_counts[i]` tokens arrived. A request's time
    to first token counts from its sending, in open loop from its due time.
    """

    token_times_s: array[float] = field(default_factory=lambda: array("d"))
    token_counts: array[int] = field(default_factory=lambda: array("l"))
    first_token_at_s: array[float] = field(default_factory=lambda: array("d"))
    first_token_s: array[float] = field(default_factory=lambda: array("d"))
    gap_at_s: array[float] = field(default_factory=lambda: array("d"))
    gap_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("l"))
    ended_at_s: array[float] = field(default_factory=lambda: array("d"))
    errors: list[str] = field(default_factory=list)


class RequestFailed(Exception):
    """The answer was an error, or broke off; the message says how."""


# Sends a request, and yields the number of tokens in each message of its answer.
Answers = Callable[[Request], AsyncIterator[int]]
# The bytes of a request for these prompt tokens and so many new ones.
Encode = Callable[[Sequence[int], int], bytes]


def grpc_answers(channel: grpc.aio.Channel) -> Answers:
    """Those of the mesh behind `channel`."""
    call: grpc.aio.UnaryStreamMultiCallable = channel.unary_stream(
        GENERATE, response_deserializer=pb.GenerateResponse.FromString
    )

    async def answers(request: Request) -> AsyncIterator[int]:
        try:
            async for response in call(request.message, timeout=REQUEST_TIMEOUT_S):
                yield len(response.token_ids)
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(f"{error.code().name}: {error.details()}") from error

    return answers


@asynccontextmanager
async def answers_of(channel: grpc.aio.Channel, *, one_call: bool) -> AsyncIterator[Answers]:
    """Those of the mesh behind `channel`, asked in one call for all requests (GenerateMany), or in
    one for each."""
    if not one_call:
        yield grpc_answers(channel)
        return
    stream = _OneCall(channel)
    reading = asyncio.create_task(stream.read())
    try:
        yield stream.answers
    finally:
        stream.close()
        await reading


class _OneCall:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._ids = itertools.count()
        self._unsent = asyncio.Queue[pb.GenerateManyRequest | None]()
        self._answers: dict[int, asyncio.Queue[pb.ManyAnswer]] = {}
        self._failure: pb.RequestError | None = None  # of the call
        call: grpc.aio.StreamStreamMultiCallable = channel.stream_stream(
            GENERATE_MANY,
            request_serializer=pb.GenerateManyRequest.SerializeToString,
            response_deserializer=pb.GenerateManyResponse.FromString,
        )
        # No deadline: it lasts as long as all loads. Each request has one of its own.
        self._call = call(self._requests())

    async def answers(self, request: Request) -> AsyncIterator[int]:
        number = next(self._ids)
        queue = self._answers[number] = asyncio.Queue()
        if self._failure is not None:
            queue.put_nowait(pb.ManyAnswer(error=self._failure))
        message = pb.GenerateRequest.FromString(request.message)
        timeout = duration(REQUEST_TIMEOUT_S)
        self._unsent.put_nowait(pb.GenerateManyRequest(id=number, request=message, timeout=timeout))
        has_ended = False
        try:
            while not has_ended:
                answer = await queue.get()
                has_ended = answer.HasField("error") or bool(answer.response.finish_reason)
                if answer.HasField("error"):
                    code = _CODES.get(answer.error.code, grpc.StatusCode.UNKNOWN)
                    raise RequestFailed(f"{code.name}: {answer.error.message}")
                yield len(answer.response.token_ids)
        finally:
            del self._answers[number]
            if not has_ended:
                self._unsent.put_nowait(pb.GenerateManyRequest(id=number))  # cancels it

    async def read(self) -> None:
        """Hands answers to those who wait for them; when the call fails, to all."""
        try:
            async for response in self._call:
                for answer in response.answers:
                    waiting = self._answers.get(answer.id)
                    if waiting is not None:
                        waiting.put_nowait(answer)
        except grpc.aio.AioRpcError as error:
            self._failure = pb.RequestError(code=error.code().value[0], message=error.details())
            for waiting in self._answers.values():
                waiting.put_nowait(pb.ManyAnswer(error=self._failure))

    def close(self) -> None:
        """Lets the call end once all requests have."""
        self._unsent.put_nowait(None)

    async def _requests(self) -> AsyncIterator[pb.GenerateManyRequest]:
        while (message := await self._unsent.get()) is not None:
            yield message


class LoadGenerator:
    """Sends requests and keeps a tally."""

    def __init__(self, answers: Answers) -> None:
        self.tally = Tally()
        self._answers = answers

    async def closed_loop(self, workers: Sequence[Iterator[Request]], *, until_s: float) -> None:
        """Each worker sends its next request when the one before has ended.

        At `until_s` (time.monotonic()) all are cancelled where they are.
        """
        running = [asyncio.create_task(self._work(requests)) for requests in workers]
        done, late = await asyncio.wait(running, timeout=max(0.0, until_s - time.monotonic()))
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()

    async def open_loop(self, requests: Sequence[Request]) -> None:
        """Sends each request at its time, whatever became of those before; waits for all."""
        start_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for request in requests:
                due_s = start_s + request.at_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                tasks.create_task(self._send(request, due_s=due_s))

    async def _work(self, requests: Iterator[Request]) -> None:
        for request in requests:
            if not await self._send(request, due_s=time.monotonic()):
                break

    async def _send(self, request: Request, *, due_s: float) -> bool:
        """Whether it was answered to its end; otherwise the tally says why not."""
        tally = self.tally
        last_s = 0.0
        try:
            async for count in self._answers(request):
                if not count:
                    continue
                now_s = time.monotonic()
                tally.token_times_s.append(now_s)
                tally.token_counts.append(count)
                if last_s:
                    tally.gap_at_s.append(now_s)
                    tally.gap_s.append(now_s - last_s)
                else:
                    tally.first_token_at_s.append(now_s)
                    tally.first_token_s.append(now_s - due_s)
                    tally.prompt_tokens.append(request.num_prompt_tokens)
                # The others of the message came with no gap.
                for _ in range(count - 1):
                    tally.gap_at_s.append(now_s)
                    tally.gap_s.append(0.0)
                last_s = now_s
            tally.ended_at_s.append(time.monotonic())
        except RequestFailed as error:
            tally.errors.append(str(error))
            return False
        return True


def encode_grpc(prompt: Sequence[int], num_new_tokens: int) -> bytes:
    """For a mesh of ours: greedy, and to its full length."""
    sampling = pb.SamplingParameters(max_tokens=num_new_tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(token_ids=prompt, sampling=sampling).SerializeToString()


def make_request(
    rng: random.Random,
    *,
    vocab_size: int,
    num_prompt_tokens: int,
    num_new_tokens: int,
    at_s: float = 0.0,
    encode: Encode = encode_grpc,
) -> Request:
    """A request of exactly these lengths, with random tokens for a prompt."""
    prompt = [rng.randrange(vocab_size) for _ in range(num_prompt_tokens)]
    return Request(
        message=encode(prompt, num_new_tokens),
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new_tokens,
        at_s=at_s,
    )
