"""A request on its way: what has come for it, and what resuming it elsewhere takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from penstock.v1 import coordinator_pb2, generation_pb2

from core.errors import PenstockError
from core.sampling.parameters import SamplingParameters
from core.sampling.stops import finish_reason
from services.common.durations import positive_duration, seconds

_REASONS = {
    "stop": generation_pb2.FINISH_REASON_STOP,
    "length": generation_pb2.FINISH_REASON_LENGTH,
}


class News(NamedTuple):
    """What has come for a request: tokens with nothing to say of them, then updates."""

    token_ids: list[int]
    updates: list[coordinator_pb2.RequestUpdate]


class OpenRequest:
    """What its reader awaits, and its link delivers. `receive` is for one task at a time.

    What waits to be received needs no bound of its own: a request never has more than its
    `max_tokens` tokens, and its reader takes everything that has come at once.
    """

    __slots__ = (
        *("_began_on", "_error", "_first_token_at", "_lost_output", "_on_cancel", "_output_ids"),
        *("_resumed_at", "_retry", "_submission", "_submitted_at", "_token_ids", "_updates"),
        *("_waiter", "ended", "is_cancelled", "is_resumed"),
    )

    def __init__(
        self,
        submission: coordinator_pb2.Submission,
        *,
        on_cancel: Callable[[OpenRequest], None],
    ) -> None:
        """`submission` is the first one, its `request_id` chosen; it is not changed here."""
        self.ended = False
        self.is_cancelled = False
        self.is_resumed = False  # a coordinator had taken it, and was lost
        self._retry: asyncio.TimerHandle | None = None
        self._submission = submission
        self._on_cancel = on_cancel
        self._began_on: coordinator_pb2.Cut | None = None  # known with its first token
        self._submitted_at = self._resumed_at = time.monotonic()
        self._first_token_at = 0.0  # none yet
        self._lost_output = False  # its latest coordinator did not see all of it
        self._error: PenstockError | None = None
        self._output_ids: list[int] = []  # received
        self._token_ids: list[int] = []  # to be received, and then the updates
        self._updates: list[coordinator_pb2.RequestUpdate] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def request_id(self) -> int:
        return self._submission.request_id

    # --- its reader

    async def receive(self) -> News:
        """Waits for news and returns all there is; raises Unavailable when nobody serves it."""
        while not self._token_ids and not self._updates:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news = News(self._token_ids, self._updates)
        self._output_ids += self._unread_ids()
        self._token_ids, self._updates = [], []
        return news

    def cancel(self) -> None:
        """Tells the coordinator to drop the request, unless it has ended. Idempotent."""
        if not self.ended and not self.is_cancelled:
            self.is_cancelled = True
            self._on_cancel(self)

    # --- its link

    def deliver_token(self, token_id: int) -> None:
        if not self._first_token_at:
            self._first_token_at = time.monotonic()
        self._token_ids.append(token_id)
        self._wake()

    def deliver(self, update: coordinator_pb2.RequestUpdate) -> None:
        if not self._first_token_at and update.token_ids:
            self._first_token_at = time.monotonic()
        if update.HasField("began_on"):
            self._began_on = update.began_on
            if not update.token_ids and not update.finish_reason:
                return  # nothing for its reader
        if self.is_resumed and update.finish_reason:
            self._complete(update.usage)
        self._updates.append(update)
        self._wake()

    def fail(self, error: PenstockError) -> None:
        self.ended = True
        self._error = error
        self._wake()

    def ends_with_its_coordinator(self, eos_token_ids: Collection[int]) -> bool:
        """Notes the loss of its coordinator; whether that had only to say that this was the end."""
        self.is_resumed = True
        reason = self._reason_to_end(eos_token_ids)
        if reason is None:
            return False
        self._lost_output = True
        self.deliver(coordinator_pb2.RequestUpdate(finish_reason=reason))
        return True

    def next_submission(self) -> coordinator_pb2.Submission:
        """What makes another coordinator go on where the one before stopped."""
        output_ids = self._output_ids + self._unread_ids()
        self._resumed_at = time.monotonic()
        self._lost_output = bool(output_ids)
        submission = coordinator_pb2.Submission()
        submission.CopyFrom(self._submission)
        submission.token_ids.extend(output_ids)
        submission.num_output_tokens = len(output_ids)
        if self._began_on is not None:
            submission.began_on.CopyFrom(self._began_on)
        if submission.HasField("timeout"):
            left_s = seconds(submission.timeout) - (time.monotonic() - self._submitted_at)
            submission.timeout.CopyFrom(positive_duration(left_s))
        return submission

    @property
    def is_retrying(self) -> bool:
        """Whether it waits to be submitted again."""
        return self._retry is not None

    def retry_later(
        self, delay_s: float, submit: Callable[[coordinator_pb2.Submission], None]
    ) -> None:
        """Submits it again after a while, unless `stop_retrying` is called before."""

        def retry() -> None:
            self._retry = None
            submit(self.next_submission())

        self._retry = asyncio.get_running_loop().call_later(delay_s, retry)

    def stop_retrying(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _reason_to_end(self, eos_token_ids: Collection[int]) -> generation_pb2.FinishReason | None:
        output_ids = self._output_ids + self._unread_ids()
        if not output_ids:
            return None
        sampling = self._submission.sampling
        reason = finish_reason(
            output_ids[-1],
            num_generated=len(output_ids),
            parameters=SamplingParameters(
                max_tokens=sampling.max_tokens,
                stop_token_ids=tuple(sampling.stop_token_ids),
                ignore_eos=sampling.ignore_eos,
            ),
            eos_token_ids=eos_token_ids,
        )
        return None if reason is None else _REASONS[reason]

    def _unread_ids(self) -> list[int]:
        if not self._updates:
            return self._token_ids
        in_updates = (token_id for update in self._updates for token_id in update.token_ids)
        return [*self._token_ids, *in_updates]

    def _complete(self, usage: generation_pb2.Usage) -> None:
        """Makes the last coordinator's durations those of the whole request, as seen from here.

        What was found in a cache at first died with who knew; the last one's count may include
        output, which is no part of the prompt.
        """
        usage.cached_tokens = min(usage.cached_tokens, len(self._submission.token_ids))
        if self._lost_output:
            usage.ClearField("queue_duration")
            prefill_s = self._first_token_at - self._submitted_at
            decode_s = time.monotonic() - self._first_token_at
            usage.prefill_duration.CopyFrom(positive_duration(prefill_s))
            usage.decode_duration.CopyFrom(positive_duration(decode_s))
        else:
            queued_s = self._resumed_at - self._submitted_at + seconds(usage.queue_duration)
            usage.queue_duration.CopyFrom(positive_duration(queued_s))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
