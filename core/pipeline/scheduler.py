"""The scheduler of one pipeline: events in, actions out, time passed in.

It owns everything mutable: requests, admission, slots, KV block tables, stop rules. It
neither waits nor sends; a service performs its actions and tells it what came of them.

Waiting requests are admitted by priority, tenants in turn and each in order of arrival
(`waiting.py`), when there are blocks for the whole prompt. When blocks run out, the youngest
sequence gives way: it goes back to the queue and is computed again later, prompt and output so
far. A sequence's next row is scheduled once its token came back, with rows that verify guesses
where the pipeline has time for them (`speculation.py`). `path.py` composes the micro-batches;
`failover.py` has sequences go on when replicas die.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence as List

from core.errors import (
    DeadlineExceeded,
    Exhausted,
    NotFinite,
    PenstockError,
    ProtocolViolation,
    Unavailable,
)
from core.pipeline.actions import Action, DropReplica, EmitTokens, FinishReason, Refuse
from core.pipeline.arrival import Pace, misfit, new_sequence
from core.pipeline.batch import NO_TOKEN
from core.pipeline.events import (
    Event,
    LinkLost,
    PipelineKnown,
    PipelineLost,
    ReplicaLost,
    RequestArrived,
    RequestCancelled,
    Tick,
    TokensSampled,
)
from core.pipeline.path import Landed
from core.pipeline.pipeline import Pipeline, ReplicaEvent
from core.pipeline.replica import Replica
from core.pipeline.sequences import Sequence, State
from core.pipeline.settings import SchedulerSettings
from core.pipeline.speculation import Speculation
from core.sampling.stops import finish_reason

# Ticks come several times a second while something is in flight. After a longer pause this process
# was held up itself, and what has come meanwhile is still to be read.
_AWAY_S = 1.0


class Scheduler:
    """See the module. Refuses requests until a path stands for the first time."""

    def __init__(self, settings: SchedulerSettings | None = None) -> None:
        self._settings = settings or SchedulerSettings()
        self._pipeline: Pipeline | None = None
        self._why_not_ready = "the pipeline is starting"
        self._sequences: dict[int, Sequence] = {}  # those that have not ended
        self.speculation = Speculation(self._settings.speculation)
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._orders = itertools.count()
        self._micro_batch_ids = itertools.count(1)
        self._pace = Pace()
        self._now_s = 0.0
        self._was_away = False
        self._may_admit = True  # something may have changed since the queue was last looked at
        self._actions: list[Action] = []
        self.num_tokens = 0  # generated
        self.num_prompt_tokens = 0  # of requests that got their first token
        self.num_cached_tokens = 0  # of these, those that had been computed before

    # --- what there is to see

    @property
    def is_ready(self) -> bool:
        """Whether new requests have a path."""
        return self._pipeline is not None and self._pipeline.is_ready

    @property
    def num_waiting(self) -> int:
        """Requests that no path serves: in the queue, or waiting for another path."""
        return len(self._sequences) - self.num_running

    @property
    def num_running(self) -> int:
        return self._pipeline.num_running if self._pipeline else 0

    @property
    def num_in_flight(self) -> int:
        return len(self._pipeline.traffic) if self._pipeline else 0

    @property
    def num_preemptions(self) -> int:
        return self._pipeline.admission.num_preemptions if self._pipeline else 0

    @property
    def num_failovers(self) -> int:
        """Sequences that went on elsewhere, or over a new link, with what they had."""
        return self._pipeline.admission.num_failovers if self._pipeline else 0

    @property
    def num_restored_tokens(self) -> int:
        """Positions that were computed again for replicas new to a sequence."""
        return self._pipeline.traffic.num_restored_rows if self._pipeline else 0

    def kv_blocks_used(self, replica_id: int) -> int:
        """Blocks handed out; 0 for a replica that is not there."""
        replica = self._replica(replica_id)
        return replica.allocator.num_used if replica else 0

    def num_sequences_on(self, replica_id: int) -> int:
        """Sequences that hold blocks on a replica; 0 for one that is not there."""
        replica = self._replica(replica_id)
        return len(replica.residents) if replica else 0

    def is_resting(self, replica_id: int) -> bool:
        """Whether a replica gets no new sequences for a while: its siblings are far faster."""
        replica = self._replica(replica_id)
        return replica is not None and replica.is_resting

    def is_drained(self, replica_id: int) -> bool:
        """Whether nothing is left on a replica that has been told to drain, or it is not there."""
        replica = self._replica(replica_id)
        if replica is None:
            return True
        return replica.is_draining and not replica.residents and not replica.flights

    def _replica(self, replica_id: int) -> Replica | None:
        return self._pipeline.topology.replicas.get(replica_id) if self._pipeline else None

    # --- events

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Takes in one event and returns what to do, in order."""
        return self.handle_all((event,), now_s)

    def handle_all(self, events: List[Event], now_s: float) -> list[Action]:
        """Takes in what happened since the last call, then schedules once."""
        self._was_away = now_s - self._now_s > _AWAY_S
        self._now_s = now_s
        self._may_admit = True
        self._actions = []
        for event in events:
            self._take_in(event)
        self._expire()
        if self._pipeline is not None:
            self._actions += self._pipeline.schedule(now_s)
        return self._actions

    def _take_in(self, event: Event) -> None:
        match event:
            case TokensSampled():
                self._on_tokens(event)
            case RequestArrived():
                self._on_arrival(event)
            case RequestCancelled():
                self._on_cancel(event)
            case Tick():
                self._check_progress()
                self._give_up()
            case PipelineKnown():
                self._on_known(event)
            case PipelineLost():
                self._lose(event.reason)
            case _:
                self._change(event)

    def _change(self, event: ReplicaEvent) -> None:
        """Takes in what becomes of replicas and links."""
        if self._pipeline is None:
            return  # it was lost as a whole
        if isinstance(event, ReplicaLost | LinkLost):
            self._why_not_ready = event.reason
        self._actions += self._pipeline.change(event)

    def _on_known(self, event: PipelineKnown) -> None:
        assert not self._sequences, "a pipeline became known while another one was in use"
        self._pipeline = Pipeline(
            event.facts,
            policy=self._settings.policy,
            shares_prefixes=self._settings.shares_prefixes,
            speculation=self.speculation,
            ids=self._micro_batch_ids,
            tenant_weights=self._settings.tenant_weights,
        )

    def _lose(self, reason: str) -> None:
        """Ends every request; those that come later are refused until another pipeline is ready."""
        self._pipeline = None
        self._why_not_ready = reason
        for sequence in list(self._sequences.values()):
            self._refuse(sequence, self._unavailable())
        self._deadlines.clear()

    def _unavailable(self) -> Unavailable:
        return Unavailable(self._why_not_ready, retry_after_s=self._settings.lost_retry_s)

    def _check_progress(self) -> None:
        if self._pipeline is None:
            return
        timeout_s = self._settings.micro_batch_timeout_s
        stall = self._pipeline.find_stall(self._now_s, timeout_s=timeout_s, was_away=self._was_away)
        if stall is not None:
            self._drop(stall.culprit.id, stall.reason)

    def _drop(self, replica_id: int, reason: str) -> None:
        """Gives a replica up that is of no use."""
        self._actions.append(DropReplica(replica_id=replica_id, reason=reason))
        self._change(ReplicaLost(replica_id=replica_id, reason=reason))

    def _give_up(self) -> None:
        """Ends requests that have waited for a path for too long."""
        if self._pipeline is None:
            return
        limit_s = self._settings.lost_limit_s
        for sequence in self._pipeline.admission.given_up(self._now_s, limit_s=limit_s):
            self._refuse(sequence, self._unavailable())

    # --- arrival

    def _on_arrival(self, event: RequestArrived) -> None:
        error = self._objection(event) or self._find_place(event)
        if error is not None:
            self._actions.append(Refuse(request_id=event.request_id, error=error))
            return
        assert self._pipeline is not None
        order = next(self._orders)
        sequence = new_sequence(event, self._pipeline.facts, order=order, now_s=self._now_s)
        own_cut = event.probed or event.began_on
        if own_cut is not None:
            sequence.cut, sequence.probes = own_cut, event.probed is not None
            self._pipeline.failover.is_due = True  # for paths of this cut
        self._sequences[event.request_id] = sequence
        self._pipeline.admission.queue.add(sequence)
        self._may_admit = True
        if event.deadline_s is not None:
            heapq.heappush(self._deadlines, (event.deadline_s, sequence.order, sequence))
        if event.num_output_tokens:
            self._finish_if_whole(sequence)

    def _finish_if_whole(self, sequence: Sequence) -> None:
        """Ends a request whose last token was generated elsewhere."""
        assert self._pipeline is not None
        reason = finish_reason(
            sequence.token_ids[-1],
            num_generated=sequence.num_generated,
            parameters=sequence.sampling,
            eos_token_ids=self._pipeline.facts.eos_token_ids,
        )
        if reason is not None:
            self._finish(sequence, self._emit(sequence), FinishReason(reason))

    def _objection(self, event: RequestArrived) -> PenstockError | None:
        """Why a request cannot be taken, now or ever; None when it can."""
        assert event.request_id not in self._sequences, "request ids are unique"
        pipeline, settings = self._pipeline, self._settings
        if pipeline is None:
            return self._unavailable()
        pipeline.settle(self._now_s)
        limit_s = settings.lost_limit_s
        if not pipeline.was_ready or pipeline.is_given_up(self._now_s, limit_s=limit_s):
            return self._unavailable()
        if event.probed is not None and not pipeline.topology.has_all(event.probed):
            return Unavailable("a replica to be probed is gone")
        return misfit(event, pipeline.facts, num_kv_blocks=pipeline.num_kv_blocks)

    def _find_place(self, event: RequestArrived) -> PenstockError | None:
        """Makes a place in the queue, if there must be: first who can run does, then who has more
        than its share gives way. Returns why there is none."""
        assert self._pipeline is not None
        queue, most = self._pipeline.admission.queue, self._settings.max_waiting
        if len(queue) >= most and self._may_admit:
            self._may_admit = False
            self._actions += self._pipeline.schedule(self._now_s)
        if len(queue) < most:
            return None
        error = Exhausted(
            f"{len(queue)} requests are waiting",
            retry_after_s=self._pace.expected_wait_s(len(queue)),
        )
        last = queue.who_gives_way(event.tenant)
        if last is None:
            return error
        self._refuse(last, error)
        return None

    # --- departure

    def _on_cancel(self, event: RequestCancelled) -> None:
        sequence = self._sequences.get(event.request_id)
        if sequence is not None:
            self._finish(sequence, self._emit(sequence), FinishReason.CANCELLED)

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

    def _emit(self, sequence: Sequence) -> EmitTokens:
        """News of a request, without tokens as yet."""
        news = EmitTokens(request_id=sequence.request_id, token_ids=[], logprobs=[])
        self._actions.append(news)
        return news

    def _finish(self, sequence: Sequence, news: EmitTokens, reason: FinishReason) -> None:
        """Makes `news` the last of a request."""
        news.finish_reason = reason
        news.usage = sequence.usage(self._now_s)
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Forgets a request. What of it is in flight is dropped on its return."""
        del self._sequences[sequence.request_id]
        if self._pipeline is not None:
            self._pipeline.admission.withdraw(sequence)
        sequence.state = State.ENDED

    # --- tokens

    def _on_tokens(self, event: TokensSampled) -> None:
        pipeline = self._pipeline
        if pipeline is None:
            return
        try:
            landed = pipeline.land(event, self._now_s)
        except ProtocolViolation as error:
            answering = pipeline.traffic.flights[event.micro_batch_id].replicas[-1]
            self._drop(answering.id, str(error))
            return
        for news in landed:
            if news.sequence.state is not State.ENDED:
                self._accept(pipeline, news)

    def _accept(self, pipeline: Pipeline, landed: Landed) -> None:
        """Gives a sequence its tokens, up to the one that ends it."""
        sequence = landed.sequence
        if NO_TOKEN in landed.token_ids:
            self._refuse(sequence, NotFinite("the model's result is NaN or infinite"))
            return
        count, reason = self._append(sequence, landed.token_ids, pipeline.facts.eos_token_ids)
        self.num_tokens += count
        sequence.last_token_s = self._now_s
        is_first = sequence.first_token_s is None
        if is_first:
            sequence.first_token_s = self._now_s
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_tokens += sequence.num_cached
        if sequence.path is not None:
            sequence.path.make_ready(sequence)
        else:
            # It was preempted while its tokens were on the way.
            pipeline.admission.queue.num_rows += count
        news = EmitTokens(
            request_id=sequence.request_id,
            token_ids=list(landed.token_ids[:count]),
            logprobs=list(landed.logprobs[:count]),
            began_on=sequence.cut if is_first else None,
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
