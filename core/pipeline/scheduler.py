"""The scheduler of one pipeline: events in, actions out, time passed in.

It owns everything mutable: requests, admission, slots, KV block tables, stop rules. It
neither waits nor sends; a service performs its actions and tells it what came of them.

Waiting requests are admitted in order of arrival, when there are blocks for the whole
prompt. When blocks run out, the youngest sequence gives way: it goes back to the queue and
is computed again later, prompt and output so far. A sequence's next row is scheduled once
its token came back, with rows that verify guesses where the pipeline has time for them
(`speculation.py`). `path.py` composes the micro-batches.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from core.errors import (
    DeadlineExceeded,
    Exhausted,
    InvalidInput,
    PenstockError,
    ProtocolViolation,
    Unavailable,
)
from core.pipeline.actions import Action, DropPipeline, EmitTokens, FinishReason, Refuse
from core.pipeline.events import (
    Event,
    PipelineFacts,
    PipelineLost,
    PipelineReady,
    RequestArrived,
    RequestCancelled,
    StageReported,
    Tick,
    TokensSampled,
)
from core.pipeline.path import Landed, Path
from core.pipeline.policy import PolicySettings
from core.pipeline.sequences import Sequence, State
from core.pipeline.speculation import Speculation, SpeculationSettings
from core.pipeline.waiting import WaitingQueue
from core.sampling.stops import finish_reason


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Bounds of one pipeline's scheduler."""

    max_waiting: int = 1024  # requests in the queue; one more is refused
    # A pipeline in which nothing returns for so long has hung.
    micro_batch_timeout_s: float = 30.0
    lost_retry_s: float = 2.0  # retry delay of those refused because the pipeline is down
    shares_prefixes: bool = True  # requests that begin alike share what was computed for it
    policy: PolicySettings = field(default_factory=PolicySettings)
    speculation: SpeculationSettings = field(default_factory=SpeculationSettings)

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise InvalidInput("max_waiting", self.max_waiting, "at least 1")
        if not self.micro_batch_timeout_s > 0:
            raise InvalidInput("micro_batch_timeout_s", self.micro_batch_timeout_s, "above 0")


class Scheduler:
    """See the module. Not ready until PipelineReady; refuses requests until then."""

    def __init__(self, settings: SchedulerSettings | None = None) -> None:
        self._settings = settings or SchedulerSettings()
        self._path: Path | None = None
        self._why_not_ready = "the pipeline is starting"
        self._sequences: dict[int, Sequence] = {}  # those that have not ended
        self._waiting = WaitingQueue()
        self.speculation = Speculation(self._settings.speculation)
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._orders = itertools.count()
        self._micro_batch_ids = itertools.count(1)
        self._pace = _Pace()
        self._now_s = 0.0
        self._actions: list[Action] = []
        self._num_past_preemptions = 0
        self.num_tokens = 0  # generated
        self.num_prompt_tokens = 0  # of requests that got their first token
        self.num_cached_tokens = 0  # of these, those that had been computed before

    # --- what there is to see

    @property
    def is_ready(self) -> bool:
        return self._path is not None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._path.running) if self._path else 0

    @property
    def num_in_flight(self) -> int:
        return self._path.num_in_flight if self._path else 0

    @property
    def num_preemptions(self) -> int:
        return self._num_past_preemptions + (self._path.num_preemptions if self._path else 0)

    @property
    def kv_blocks_used_S(self) -> list[int]:
        """Blocks handed out, stage by stage; empty while there is no pipeline."""
        return [a.num_used for a in self._path.mirror.allocators] if self._path else []

    # --- events

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Takes in one event and returns what to do, in order."""
        return self.handle_all((event,), now_s)

    def handle_all(self, events: List[Event], now_s: float) -> list[Action]:
        """Takes in what happened since the last call, then schedules once."""
        self._now_s = now_s
        self._actions = []
        for event in events:
            self._take_in(event)
        self._expire()
        if self._path is not None:
            self._actions += self._path.schedule(now_s)
        return self._actions

    def _take_in(self, event: Event) -> None:
        match event:
            case TokensSampled():
                self._on_tokens(event)
            case RequestArrived():
                self._on_arrival(event)
            case RequestCancelled():
                self._on_cancel(event)
            case StageReported():
                if self._path is not None:
                    self._path.observe(event)
            case Tick():
                self._check_progress()
            case PipelineReady():
                self._on_ready(event)
            case PipelineLost():
                self._lose(event.reason)

    def _on_ready(self, event: PipelineReady) -> None:
        assert not self._sequences, "a pipeline became ready while another one was in use"
        self._path = Path(
            event.facts,
            waiting=self._waiting,
            speculation=self.speculation,
            ids=self._micro_batch_ids,
            settings=self._settings.policy,
            shares_prefixes=self._settings.shares_prefixes,
            now_s=self._now_s,
        )

    def _lose(self, reason: str) -> None:
        """Ends every request; those that come later are refused until PipelineReady."""
        self._num_past_preemptions = self.num_preemptions
        self._path = None
        self._why_not_ready = reason
        for sequence in list(self._sequences.values()):
            self._refuse(sequence, self._unavailable())
        self._deadlines.clear()

    def _unavailable(self) -> Unavailable:
        return Unavailable(self._why_not_ready, retry_after_s=self._settings.lost_retry_s)

    def _check_progress(self) -> None:
        stalled_s = self._path.seconds_without_progress(self._now_s) if self._path else 0.0
        if stalled_s > self._settings.micro_batch_timeout_s:
            self._drop(f"no micro-batch returned within {stalled_s:.1f} s")

    def _drop(self, reason: str) -> None:
        self._lose(reason)
        self._actions.append(DropPipeline(reason=reason))

    # --- arrival

    def _on_arrival(self, event: RequestArrived) -> None:
        error = self._objection(event)
        if error is not None:
            self._actions.append(Refuse(request_id=event.request_id, error=error))
            return
        sequence = Sequence(
            request_id=event.request_id,
            order=next(self._orders),
            token_ids=list(event.token_ids),
            num_prompt_tokens=len(event.token_ids),
            sampling=event.sampling,
            arrived_s=self._now_s,
            traceparent=event.traceparent,
            cache_salt=event.cache_salt,
        )
        self._sequences[event.request_id] = sequence
        self._waiting.add(sequence)
        if event.deadline_s is not None:
            heapq.heappush(self._deadlines, (event.deadline_s, sequence.order, sequence))

    def _objection(self, event: RequestArrived) -> PenstockError | None:
        """Why a request cannot be taken, now or ever; None when it can."""
        assert event.request_id not in self._sequences, "request ids are unique"
        if self._path is None:
            return self._unavailable()
        objection = _misfit(event, self._path.facts)
        if objection is None and len(self._waiting) >= self._settings.max_waiting:
            retry_after_s = self._pace.expected_wait_s(len(self._waiting))
            return Exhausted(
                f"{len(self._waiting)} requests are waiting", retry_after_s=retry_after_s
            )
        return objection

    # --- departure

    def _on_cancel(self, event: RequestCancelled) -> None:
        sequence = self._sequences.get(event.request_id)
        if sequence is not None:
            news = EmitTokens(request_id=sequence.request_id, token_ids=[], logprobs=[])
            self._actions.append(news)
            self._finish(sequence, news, FinishReason.CANCELLED)

    def _expire(self) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= self._now_s:
            sequence = heapq.heappop(deadlines)[2]
            if sequence.state is not State.ENDED:
                self._refuse(sequence, DeadlineExceeded("the request's deadline passed"))

    def _refuse(self, sequence: Sequence, error: PenstockError) -> None:
        usage = sequence.usage(self._now_s)
        self._actions.append(Refuse(request_id=sequence.request_id, error=error, usage=usage))
        self._remove(sequence)

    def _finish(self, sequence: Sequence, news: EmitTokens, reason: FinishReason) -> None:
        """Makes `news` the last of a request."""
        news.finish_reason = reason
        news.usage = sequence.usage(self._now_s)
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Forgets a request. What of it is in flight is dropped on its return."""
        del self._sequences[sequence.request_id]
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        elif self._path is not None:
            self._path.remove(sequence)
        sequence.state = State.ENDED

    # --- tokens

    def _on_tokens(self, event: TokensSampled) -> None:
        path = self._path
        if path is None:
            return
        try:
            landed = path.land(event, self._now_s)
        except ProtocolViolation as error:
            self._drop(str(error))
            return
        for news in landed:
            if news.sequence.state is not State.ENDED:
                self._accept(path, news)

    def _accept(self, path: Path, landed: Landed) -> None:
        """Gives a sequence its tokens, up to the one that ends it."""
        sequence = landed.sequence
        count, reason = self._append(sequence, landed.token_ids, path.facts.eos_token_ids)
        self.num_tokens += count
        sequence.last_token_s = self._now_s
        if sequence.first_token_s is None:
            sequence.first_token_s = self._now_s
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_tokens += sequence.num_cached
        if sequence.state is State.RUNNING:
            path.make_ready(sequence)
        else:
            self._waiting.num_rows += count  # was preempted while its tokens were on the way
        news = EmitTokens(
            request_id=sequence.request_id,
            token_ids=list(landed.token_ids[:count]),
            logprobs=list(landed.logprobs[:count]),
        )
        self._actions.append(news)
        if reason is not None:
            self._pace.note_finish(self._now_s)
            self._finish(sequence, news, reason)

    def _append(
        self, sequence: Sequence, token_ids: List[int], eos_token_ids: List[int]
    ) -> tuple[int, FinishReason | None]:
        """How many of the tokens the sequence takes, and why it ends with the last of them."""
        for count, token_id in enumerate(token_ids, start=1):
            sequence.token_ids.append(token_id)
            reason = finish_reason(
                token_id,
                num_generated=sequence.num_generated,
                parameters=sequence.sampling,
                eos_token_ids=eos_token_ids,
            )
            if reason is not None:
                return count, FinishReason(reason)
        return len(token_ids), None


class _Pace:
    """How fast requests finish, for telling those that are refused when to return."""

    def __init__(self) -> None:
        self._mean_interval_s = 1.0
        self._last_s: float | None = None

    def note_finish(self, now_s: float) -> None:
        if self._last_s is not None:
            self._mean_interval_s += 0.05 * (now_s - self._last_s - self._mean_interval_s)
        self._last_s = now_s

    def expected_wait_s(self, num_waiting: int) -> float:
        """Until a tenth of the queue is gone; from half a second to half a minute."""
        return min(max(self._mean_interval_s * num_waiting / 10, 0.5), 30.0)


def _misfit(event: RequestArrived, facts: PipelineFacts) -> PenstockError | None:
    """Why a request can never be served by this pipeline; None when it can."""
    num_prompt, max_tokens = len(event.token_ids), event.sampling.max_tokens
    if num_prompt == 0:
        return InvalidInput("token_ids", [], "at least one token")
    if max_tokens < 1:
        return InvalidInput("sampling.max_tokens", max_tokens, "at least 1")
    if num_prompt + max_tokens > facts.context_length:
        allowed = f"prompt ({num_prompt}) and completion within {facts.context_length} tokens"
        return InvalidInput("sampling.max_tokens", max_tokens, allowed)
    # The last token is never computed, so its position needs no block.
    wanted = -(-(num_prompt + max_tokens - 1) // facts.kv_block_size)
    held = min(stage.num_kv_blocks for stage in facts.stages)
    if wanted > held:
        return Exhausted(f"the request may need {wanted} KV blocks; a stage has {held}")
    return None
