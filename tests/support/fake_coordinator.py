"""A coordinator that follows a script: a real gRPC server without any pipeline behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
from penstock.v1 import coordinator_pb2, coordinator_pb2_grpc, generation_pb2

from services.common.servers import create_server
from services.common.telemetry import no_telemetry

Update = coordinator_pb2.RequestUpdate
Script = Callable[[coordinator_pb2.Submission], Iterable[Update]]


_PULSE_S, _PULSE = 0.5, coordinator_pb2.ConnectResponse()


def tokens(*token_ids: int) -> Update:
    """An update with tokens."""
    return Update(token_ids=token_ids)


def end(reason: str = "LENGTH", *token_ids: int) -> Update:
    """The last update, with a usage that tells its fields apart."""
    update = Update(
        token_ids=token_ids,
        finish_reason=generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"),
    )
    update.usage.prompt_tokens = 99
    update.usage.completion_tokens = 99
    update.usage.cached_tokens = 3
    update.usage.queue_duration.FromMilliseconds(1)
    update.usage.prefill_duration.FromMilliseconds(2)
    update.usage.decode_duration.FromMilliseconds(3)
    return update


def refusal(code: grpc.StatusCode, message: str, *, retry_s: int | None = None) -> Update:
    """The last update of a request that was refused or failed."""
    update = end("ERROR")
    update.refusal.code = code.value[0]
    update.refusal.message = message
    if retry_s is not None:
        update.refusal.retry_delay.FromSeconds(retry_s)
    return update


def echo(submission: coordinator_pb2.Submission) -> Iterable[Update]:
    """Answers with the prompt, one token an update."""
    yield from (tokens(token_id) for token_id in submission.token_ids)
    yield end("LENGTH")


def generate(
    submission: coordinator_pb2.Submission, *, end_apart: bool = False
) -> Iterable[Update]:
    """Answers as a model does whose every token follows from all before it, one an update.

    With `end_apart` the end is an update of its own, behind the last token.
    """
    sampling = submission.sampling
    token_ids = list(submission.token_ids)
    num_left = sampling.max_tokens - submission.num_output_tokens
    assert num_left > 0, "a request was submitted that had come to its end"
    for left in range(num_left, 0, -1):
        token_ids.append((sum(token_ids) * 31 + len(token_ids)) % 251)
        update = tokens(token_ids[-1])
        if sampling.HasField("logprobs"):
            update.logprobs.add().chosen.token_id = token_ids[-1]
        if left == 1 and not end_apart:
            update.MergeFrom(end("LENGTH"))
        yield update
    if end_apart:
        yield end("LENGTH")


class FakeCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Sends each request the updates of `script` at once; one that they do not end waits for its
    cancellation, which it answers as a coordinator does. What arrives is kept.
    """

    def __init__(self, *, vocab_size: int = 300, context_length: int = 200) -> None:
        self.script: Script = echo
        self.mesh = coordinator_pb2.MeshState(stages_ready=[True, True])
        model = self.mesh.model
        model.name, model.number_format, model.num_stages = "tiny", "bf16", 2
        model.vocab_size, model.context_length, model.ready = vocab_size, context_length, True
        self.submissions: list[coordinator_pb2.Submission] = []
        self.cancelled: asyncio.Queue[int] = asyncio.Queue()
        self.num_messages = 0
        self.num_streams = 0
        self.takeovers: asyncio.Queue[None] = asyncio.Queue()
        self.answers_cancellations = True
        self.is_silent = False  # has no pulse
        self._has_stream = asyncio.Condition()
        # One for each stream to come: it breaks off behind so many messages. Then they last.
        self.breaks: list[int] = []
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self._open: set[int] = set()
        self._server: grpc.aio.Server | None = None

    async def Connect(
        self, requests: AsyncIterator[coordinator_pb2.ConnectRequest], context: Any
    ) -> AsyncIterator[coordinator_pb2.ConnectResponse]:
        self._outgoing = asyncio.Queue()
        self._open.clear()
        async with self._has_stream:
            self.num_streams += 1
            self._has_stream.notify_all()
        num_left = self.breaks.pop(0) if self.breaks else -1
        self.tell_mesh()
        reading = asyncio.ensure_future(self._read(requests))
        try:
            while True:
                if num_left == 0:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "by the test")
                message = await self._next_message()
                num_left -= message != _PULSE
                if isinstance(message, grpc.StatusCode):
                    if message is not grpc.StatusCode.OK:
                        await context.abort(message, "by the script")
                    return
                yield message
        finally:
            reading.cancel()

    async def _next_message(self) -> Any:
        while True:
            try:
                return await asyncio.wait_for(self._outgoing.get(), _PULSE_S)
            except TimeoutError:
                if not self.is_silent:
                    return _PULSE

    async def wait_for_stream(self, number: int) -> None:
        """Returns once so many streams have been opened in all."""
        async with self._has_stream:
            await self._has_stream.wait_for(lambda: self.num_streams >= number)

    def tell_mesh(self) -> None:
        """Sends the state of the mesh."""
        message = coordinator_pb2.ConnectResponse()
        message.mesh.CopyFrom(self.mesh)
        self._outgoing.put_nowait(message)

    def send(self, request_id: int, *updates: Update) -> None:
        """Sends updates of a request in one message, bare tokens as a coordinator does."""
        message = coordinator_pb2.ConnectResponse()
        for update in updates:
            update.request_id = request_id
            if not (update.logprobs or update.finish_reason or message.updates):
                message.token_request_ids.extend([request_id] * len(update.token_ids))
                message.token_ids.extend(update.token_ids)
                continue
            message.updates.append(update)
            if update.finish_reason:
                self._open.discard(request_id)
        self._outgoing.put_nowait(message)

    def send_message(self, message: coordinator_pb2.ConnectResponse) -> None:
        """Sends a message as it is."""
        self._outgoing.put_nowait(message)

    def end_stream(self, code: grpc.StatusCode) -> None:
        """Ends the stream with a status, after what was sent before."""
        self._outgoing.put_nowait(code)

    async def _read(self, requests: AsyncIterator[coordinator_pb2.ConnectRequest]) -> None:
        async for request in requests:
            if request.take_over:
                self.takeovers.put_nowait(None)
                continue
            self.num_messages += 1
            for submission in request.submissions:
                self.submissions.append(submission)
                self._open.add(submission.request_id)
                for update in self.script(submission):
                    self.send(submission.request_id, update)
            for cancellation in request.cancellations:
                if self.answers_cancellations and cancellation.request_id in self._open:
                    self.send(cancellation.request_id, end("CANCELLED"))
                self.cancelled.put_nowait(cancellation.request_id)

    async def start(self, port: int = 0) -> int:
        """Starts a server and returns its port."""
        self._server = create_server(no_telemetry())
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Dies: streams break off."""
        if self._server is not None:
            await self._server.stop(None)
