"""The requests of one GenerateMany stream, and what is new of all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from penstock.v1 import generation_pb2

from core.errors import InvalidInput, PenstockError
from services.common.durations import seconds
from services.common.statuses import status_from_error
from services.common.telemetry import callers_context
from services.gateway.caller import current_caller
from services.gateway.generation import TextGenerator
from services.gateway.request_stream import answer_beside_each_other

# Requests of one stream that are worked on at a time, and answers in one message.
MAX_REQUESTS_A_STREAM = MAX_ANSWERS_A_MESSAGE = 256
_LONGEST_TIMEOUT_S = 365 * 86_400.0
_CANCELLED = generation_pb2.GenerateResponse(finish_reason=generation_pb2.FINISH_REASON_CANCELLED)


class ManyAnswers:
    """Answers requests beside each other. What is new of them since the last message was written
    makes up the next one.

    What waits to be written needs no bound of its own: a request holds its place among
    MAX_REQUESTS_A_STREAM until its last answer was written, so that a client that does not read
    is not read from.
    """

    def __init__(self, generator: TextGenerator, context: grpc.aio.ServicerContext) -> None:
        self._generator = generator
        self._context = context
        self._caller = current_caller()
        self._parent = callers_context(context.invocation_metadata())
        self._tasks: dict[int, asyncio.Task[None]] = {}  # of open requests
        self._answers: list[generation_pb2.ManyAnswer] = []
        self._num_put = self._num_written = 0
        self._has_news = asyncio.Event()
        # Those whose last answer was the so-manieth, in that order, and wait until it was written.
        self._unwritten: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._all_read = False

    async def responses(
        self, requests: AsyncIterator[generation_pb2.GenerateManyRequest]
    ) -> AsyncIterator[generation_pb2.GenerateManyResponse]:
        """Yields messages until all requests are answered, then raises what ended the stream."""
        reading = asyncio.create_task(self._read(requests))
        try:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                while self._answers:
                    taken = self._answers[:MAX_ANSWERS_A_MESSAGE]
                    del self._answers[: len(taken)]
                    yield generation_pb2.GenerateManyResponse(answers=taken)
                    self._note_written(len(taken))
                if self._all_read:
                    break
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[generation_pb2.GenerateManyRequest]) -> None:
        try:
            await answer_beside_each_other(requests, self._start, most=MAX_REQUESTS_A_STREAM)
        finally:
            self._all_read = True
            self._has_news.set()

    def _start(
        self, tasks: asyncio.TaskGroup, request: generation_pb2.GenerateManyRequest
    ) -> asyncio.Task[None] | None:
        running = self._tasks.get(request.id)
        if not request.HasField("request"):
            if running is not None:
                running.cancel()
            return None
        if running is not None:
            allowed = "an id that no open request of the stream has"
            raise InvalidInput("id", request.id, allowed)
        task = tasks.create_task(self._answer(request))
        self._tasks[request.id] = task
        # Here, since a task that is cancelled before it has begun never sees it.
        task.add_done_callback(lambda _: self._end(request.id, task))
        return task

    def _end(self, request_id: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get(request_id) is task:  # its last answer is missing
            del self._tasks[request_id]
            self._put(generation_pb2.ManyAnswer(id=request_id, response=_CANCELLED))

    async def _answer(self, request: generation_pb2.GenerateManyRequest) -> None:
        try:
            generated = self._generator.generate(
                request.request,
                timeout_s=self._time_left(request),
                caller=self._caller,
                parent=self._parent,
            )
            async with aclosing(generated):
                async for response in generated:
                    self._put(generation_pb2.ManyAnswer(id=request.id, response=response))
        except PenstockError as error:
            answer = generation_pb2.ManyAnswer(id=request.id)
            answer.error.ParseFromString(status_from_error(error).details)
            self._put(answer)
        del self._tasks[request.id]  # the id is free again
        written = asyncio.get_running_loop().create_future()
        self._unwritten.append((self._num_put, written))
        await written

    def _time_left(self, request: generation_pb2.GenerateManyRequest) -> float | None:
        """Seconds until the request's deadline or the call's, whichever comes first."""
        left_s = self._context.time_remaining()
        if request.HasField("timeout"):
            timeout_s = seconds(request.timeout)
            if not 0.0 < timeout_s <= _LONGEST_TIMEOUT_S:
                raise InvalidInput("timeout", timeout_s, "more than 0 s, up to 365 days")
            left_s = timeout_s if left_s is None else min(timeout_s, left_s)
        return left_s

    def _put(self, answer: generation_pb2.ManyAnswer) -> None:
        self._answers.append(answer)
        self._num_put += 1
        self._has_news.set()

    def _note_written(self, count: int) -> None:
        self._num_written += count
        while self._unwritten and self._unwritten[0][0] <= self._num_written:
            written = self._unwritten.popleft()[1]
            if not written.done():  # its request was cancelled meanwhile
                written.set_result(None)
