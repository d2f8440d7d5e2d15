"""All open requests of a gateway. They outlive the coordinators that serve them.

When a coordinator is lost, a *gap* begins: requests wait for the next one, new ones too, for at
most `resume_limit_s`. Whoever ends the gap gets all of them, as prompt and output so far.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Collection, Sequence

import grpc
from penstock.v1 import coordinator_pb2

from core.errors import Exhausted, ProtocolViolation, Unavailable
from services.gateway.open_request import OpenRequest

_LOG = logging.getLogger(__name__)
# A token id takes at most 5 bytes on the wire: keeps a message well below 4 MiB.
_MAX_TOKENS_A_MESSAGE = 256 * 1024
# New requests that wait in a gap: as many as a coordinator lets wait by default.
_MAX_HELD = 1024
# Where a coordinator that is full does not say when to try again.
_RETRY_DELAY_S = 0.5
_RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


class OpenRequests:
    """What is submitted, delivered and cancelled. Knows no streams."""

    def __init__(self, *, resume_limit_s: float) -> None:
        self.has_news = asyncio.Event()  # set while `next_message` has something to say
        self._resume_limit_s = resume_limit_s
        self._ids = itertools.count(1)
        self._open: dict[int, OpenRequest] = {}
        self._submissions: list[coordinator_pb2.Submission] = []
        self._cancellations: list[int] = []
        self._takes = False  # there is somebody to send requests to, or to refuse them
        self._gap: asyncio.TimerHandle | None = None
        self._num_held = 0  # submitted since the gap began
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_open(self) -> int:
        """Requests that have been submitted and have not ended."""
        return len(self._open)

    async def wait_until_idle(self) -> None:
        """Waits until no request is open."""
        await self._idle.wait()

    # --- for those who want an answer

    def submit(self, submission: coordinator_pb2.Submission) -> OpenRequest:
        """Sends a request, whose id is chosen here.

        Raises Unavailable when there is no coordinator and has been none within the limit, and
        Exhausted when too many wait for one.
        """
        if not self._takes and self._gap is None:
            raise Unavailable("the coordinator cannot be reached")
        if self._num_held >= _MAX_HELD:
            raise Exhausted("too many requests wait for a coordinator", retry_after_s=1.0)
        submission.request_id = next(self._ids)
        request = OpenRequest(submission, on_cancel=self._cancel)
        self._open[request.request_id] = request
        self._idle.clear()
        if self._gap is None:
            self._send(submission)
        else:
            self._num_held += 1
        return request

    def forget(self, request: OpenRequest) -> None:
        """Drops what still comes for a request."""
        request.ended = True
        request.stop_retrying()
        self._open.pop(request.request_id, None)
        if not self._open:
            self._idle.set()

    def _cancel(self, request: OpenRequest) -> None:
        if self._gap is not None or request.is_retrying:
            self.forget(request)  # nobody else knows of it
            return
        self._cancellations.append(request.request_id)  # it ends with what is answered to that
        self.has_news.set()

    # --- coordinators come and go

    def accept(self) -> None:
        """There is a coordinator. It need not be able to serve: it refuses requests itself."""
        self._takes = True

    def resume(self) -> None:
        """The coordinator can serve: ends the gap, if there is one. The oldest requests first."""
        if self._gap is None:
            return
        self._end_gap()
        for request in self._open.values():
            self._send(request.next_submission())
        _LOG.info("requests go on", extra={"open": len(self._open)})

    def lose(self, eos_token_ids: Collection[int]) -> None:
        """The coordinator is gone: begins a gap. Those that had come to their end, end.

        `eos_token_ids` are those of the coordinator's model.
        """
        self._takes = False
        self._submissions.clear()
        self._cancellations.clear()
        self.has_news.clear()
        if self._gap is None:
            loop = asyncio.get_running_loop()
            self._gap = loop.call_later(self._resume_limit_s, self.give_up)
        for request in list(self._open.values()):
            request.stop_retrying()
            if request.is_cancelled:
                self._fail(request)
            elif request.ends_with_its_coordinator(eos_token_ids):
                self.forget(request)

    def give_up(self) -> None:
        """Nobody will resume them: all open requests fail, and new ones do not wait."""
        self._end_gap()
        if self._open:
            _LOG.error("no coordinator for open requests", extra={"open": len(self._open)})
        for request in list(self._open.values()):
            self._fail(request)

    def _fail(self, request: OpenRequest) -> None:
        self.forget(request)
        request.fail(Unavailable("the coordinator was lost while it served the request"))

    def _end_gap(self) -> None:
        if self._gap is not None:
            self._gap.cancel()
        self._gap = None
        self._num_held = 0

    # --- what the coordinator is told

    def next_message(self) -> coordinator_pb2.ConnectRequest:
        """Takes what has gathered; very long prompts are spread over several messages."""
        num_tokens = taken = 0
        for submission in self._submissions:
            if taken and num_tokens + len(submission.token_ids) > _MAX_TOKENS_A_MESSAGE:
                break
            num_tokens += len(submission.token_ids)
            taken += 1
        message = coordinator_pb2.ConnectRequest(submissions=self._submissions[:taken])
        del self._submissions[:taken]
        # A cancellation must not overtake its submission.
        if not self._submissions:
            for request_id in self._cancellations:
                message.cancellations.add(request_id=request_id)
            self._cancellations.clear()
            self.has_news.clear()
        return message

    def _send(self, submission: coordinator_pb2.Submission) -> None:
        self._submissions.append(submission)
        self.has_news.set()

    # --- what it tells

    def deliver(self, message: coordinator_pb2.ConnectResponse) -> None:
        """Passes on what is said of open requests; raises ProtocolViolation."""
        self._deliver_tokens(message.token_request_ids, message.token_ids)
        for update in message.updates:
            request = self._open.get(update.request_id)
            if request is not None:
                self._deliver_update(request, update)

    def _deliver_tokens(self, request_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        if len(request_ids) != len(token_ids):
            raise ProtocolViolation(f"{len(token_ids)} tokens for {len(request_ids)} requests")
        for request_id, token_id in zip(request_ids, token_ids, strict=True):
            request = self._open.get(request_id)
            if request is not None:
                request.deliver_token(token_id)

    def _deliver_update(self, request: OpenRequest, update: coordinator_pb2.RequestUpdate) -> None:
        is_refused = update.refusal.code == _RESOURCE_EXHAUSTED
        if is_refused and request.is_resumed and not request.is_cancelled:
            # One coordinator had taken it: the full queue of another does not lose it.
            delay_s = update.refusal.retry_delay.ToMilliseconds() / 1e3 or _RETRY_DELAY_S
            request.retry_later(delay_s, self._send)
            return
        if update.finish_reason:
            self.forget(request)
        request.deliver(update)
