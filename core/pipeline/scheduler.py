"""The scheduler of one pipeline: events in, actions out, time passed in.

It owns everything mutable: requests, admission, slots, KV block tables, stop rules. It
neither waits nor sends; a service performs its actions and tells it what came of them.

- A micro-batch mixes decodes (one row of each of several sequences, oldest token first)
  and prefill chunks. Sequences join and leave between micro-batches.
- How many micro-batches carry decodes at a time, and how much prefill rides along, follows
  from measured times (`policy.py`).
- Waiting requests are admitted in order of arrival, when there are blocks for the whole
  prompt. When blocks run out, the youngest sequence gives way: it goes back to the queue
  and is computed again later, prompt and output so far.
- A sequence's next row is scheduled once its token came back.

Stages perform orders first in, first out; results return in the order of launching.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import NamedTuple

from core.errors import DeadlineExceeded, Exhausted, InvalidInput, PenstockError, Unavailable
from core.pipeline.actions import (
    Action,
    DropPipeline,
    EmitTokens,
    FinishReason,
    FlushUpdates,
    Refuse,
    RunMicroBatch,
)
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
from core.pipeline.flights import Flight, FlightHistory
from core.pipeline.mirror import PathMirror
from core.pipeline.policy import InFlightPolicy, PolicySettings
from core.pipeline.sequences import Sequence, State
from core.sampling.stops import finish_reason

_REFRESH_S = 0.25  # how often the policy looks at new measurements


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Bounds of one pipeline's scheduler."""

    max_waiting: int = 1024  # requests in the queue; one more is refused
    # A pipeline in which nothing returns for so long has hung.
    micro_batch_timeout_s: float = 30.0
    lost_retry_s: float = 2.0  # retry delay of those refused because the pipeline is down
    policy: PolicySettings = field(default_factory=PolicySettings)

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise InvalidInput("max_waiting", self.max_waiting, "at least 1")
        if not self.micro_batch_timeout_s > 0:
            raise InvalidInput("micro_batch_timeout_s", self.micro_batch_timeout_s, "above 0")


class Chunk(NamedTuple):
    """Prompt rows of one sequence in the next micro-batch."""

    sequence: Sequence
    rows: int


class Scheduler:
    """See the module. Not ready until PipelineReady; refuses requests until then."""

    def __init__(self, settings: SchedulerSettings | None = None) -> None:
        self._settings = settings or SchedulerSettings()
        self._facts: PipelineFacts | None = None
        self._why_not_ready = "the pipeline is starting"
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._waiting_rows = 0
        self._running: set[Sequence] = set()
        self._ready: deque[Sequence] = deque()  # decodes whose token came back
        self._partial: Sequence | None = None  # admitted, prompt not wholly scheduled
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._next_order = 0
        self._next_id = 1
        self._mean_finish_interval_s = 1.0
        self._last_finish_s: float | None = None
        self._now_s = 0.0
        self._actions: list[Action] = []
        self.num_preemptions = 0
        self.num_tokens = 0  # generated
        self.num_prompt_tokens = 0  # of requests that were admitted
        self._clear_flights(0)

    # --- what there is to see

    @property
    def is_ready(self) -> bool:
        return self._facts is not None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def kv_blocks_used_S(self) -> list[int]:
        """Blocks handed out, stage by stage; empty while there is no pipeline."""
        return [a.num_used for a in self._mirror.allocators] if self._facts else []

    # --- events

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Takes in one event and returns what to do, in order."""
        return self.handle_all((event,), now_s)

    def handle_all(self, events: List[Event], now_s: float) -> list[Action]:
        """Takes in what happened since the last call, then schedules once."""
        self._now_s = now_s
        actions: list[Action] = []
        self._actions = actions
        for event in events:
            match event:
                case TokensSampled():
                    self._on_tokens(event)
                case RequestArrived():
                    self._on_arrival(event)
                case RequestCancelled():
                    self._on_cancel(event)
                case StageReported():
                    self._on_report(event)
                case Tick():
                    self._check_progress()
                case PipelineReady():
                    self._on_ready(event)
                case PipelineLost():
                    self._lose(event.reason)
        self._expire()
        if self._facts is not None:
            self._schedule()
        return actions

    def _on_ready(self, event: PipelineReady) -> None:
        assert not self._sequences, "a pipeline became ready while another one was in use"
        facts = self._facts = event.facts
        self._mirror = PathMirror(facts)
        self._max_rows = min(stage.max_rows for stage in facts.stages)
        self._policy = InFlightPolicy(len(facts.stages), self._settings.policy)
        self._refreshed_s = self._now_s
        self._clear_flights(len(facts.stages))

    def _clear_flights(self, num_stages: int) -> None:
        self._flights: deque[Flight] = deque()
        self._history = FlightHistory(num_stages)
        self._num_decode_flights = 0
        self._returned_id = self._next_id - 1
        self._returned_s = self._now_s

    def _lose(self, reason: str) -> None:
        """Ends every request; those that come later are refused until PipelineReady."""
        self._facts = None
        self._why_not_ready = reason
        for sequence in list(self._sequences.values()):
            self._refuse(sequence, self._unavailable())
        self._waiting.clear()
        self._waiting_rows = 0
        self._running.clear()
        self._ready.clear()
        self._partial = None
        self._deadlines.clear()
        self._clear_flights(0)

    def _unavailable(self) -> Unavailable:
        return Unavailable(self._why_not_ready, retry_after_s=self._settings.lost_retry_s)

    def _check_progress(self) -> None:
        if not self._flights:
            return
        since_s = max(self._flights[0].launched_s, self._returned_s)
        if self._now_s - since_s > self._settings.micro_batch_timeout_s:
            self._drop(f"no micro-batch returned within {self._now_s - since_s:.1f} s")

    def _drop(self, reason: str) -> None:
        self._lose(reason)
        self._actions.append(DropPipeline(reason=reason))

    def _on_report(self, event: StageReported) -> None:
        if self._facts is None:
            return
        stage = event.stage_index
        alone, overlapped = self._history.match(stage, event.batch_rows, event.batch_seconds)
        for is_overlapped, seen in ((False, alone), (True, overlapped)):
            if seen.rows:
                self._policy.observe_stage(
                    stage,
                    overlapped=is_overlapped,
                    rows=seen.rows,
                    pairs=seen.pairs,
                    seconds=seen.seconds,
                )

    # --- arrival and departure

    def _on_arrival(self, event: RequestArrived) -> None:
        error = self._objection(event)
        if error is not None:
            self._actions.append(Refuse(request_id=event.request_id, error=error))
            return
        sequence = Sequence(
            request_id=event.request_id,
            order=self._next_order,
            token_ids=list(event.token_ids),
            num_prompt_tokens=len(event.token_ids),
            sampling=event.sampling,
            arrived_s=self._now_s,
            traceparent=event.traceparent,
        )
        self._next_order += 1
        self._sequences[event.request_id] = sequence
        self._waiting.append(sequence)
        self._waiting_rows += len(sequence.token_ids)
        if event.deadline_s is not None:
            heapq.heappush(self._deadlines, (event.deadline_s, sequence.order, sequence))

    def _objection(self, event: RequestArrived) -> PenstockError | None:
        """Why a request cannot be taken now or ever; None when it can."""
        facts = self._facts
        if facts is None:
            return self._unavailable()
        assert event.request_id not in self._sequences, "request ids are unique"
        num_prompt, max_tokens = len(event.token_ids), event.sampling.max_tokens
        if num_prompt == 0:
            return InvalidInput("token_ids", [], "at least one token")
        if max_tokens < 1:
            return InvalidInput("sampling.max_tokens", max_tokens, "at least 1")
        if num_prompt + max_tokens > facts.context_length:
            return InvalidInput(
                "sampling.max_tokens",
                max_tokens,
                f"prompt ({num_prompt}) and completion within {facts.context_length} tokens",
            )
        # The last token is never computed, so its position needs no block.
        wanted = self._mirror.blocks_for(num_prompt + max_tokens - 1)
        held = min(stage.num_kv_blocks for stage in facts.stages)
        if wanted > held:
            return Exhausted(f"the request may need {wanted} KV blocks; a stage has {held}")
        if len(self._waiting) >= self._settings.max_waiting:
            return Exhausted(
                f"{len(self._waiting)} requests are waiting",
                retry_after_s=self._expected_wait_s(),
            )
        return None

    def _expected_wait_s(self) -> float:
        """Until a tenth of the queue is gone, at the pace of late."""
        wait_s = self._mean_finish_interval_s * len(self._waiting) / 10
        return min(max(wait_s, 0.5), 30.0)

    def _on_cancel(self, event: RequestCancelled) -> None:
        sequence = self._sequences.get(event.request_id)
        if sequence is not None:
            self._finish(sequence, FinishReason.CANCELLED)

    def _expire(self) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= self._now_s:
            sequence = heapq.heappop(deadlines)[2]
            if sequence.state is not State.ENDED:
                self._refuse(sequence, DeadlineExceeded("the request's deadline passed"))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._actions.append(
            EmitTokens(
                request_id=sequence.request_id,
                token_ids=[],
                logprobs=[],
                finish_reason=reason,
                usage=sequence.usage(self._now_s),
            )
        )
        self._remove(sequence)

    def _refuse(self, sequence: Sequence, error: PenstockError) -> None:
        usage = sequence.usage(self._now_s)
        self._actions.append(
            Refuse(request_id=sequence.request_id, error=error, usage=usage),
        )
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Forgets a request. What of it is in flight is dropped on its return."""
        del self._sequences[sequence.request_id]
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
            self._waiting_rows -= len(sequence.token_ids)
        elif self._facts is not None:
            self._stop_running(sequence)
        sequence.state = State.ENDED

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        if sequence is self._partial:
            self._partial = None
        elif sequence in self._ready:
            self._ready.remove(sequence)
        self._mirror.end(sequence, returned_id=self._returned_id)

    # --- tokens

    def _on_tokens(self, event: TokensSampled) -> None:
        if event.micro_batch_id <= self._returned_id:
            return  # of a pipeline that was lost
        if not self._flights or event.micro_batch_id != self._flights[0].micro_batch_id:
            self._drop(f"micro-batch {event.micro_batch_id} returned out of order")
            return
        flight = self._flights[0]
        if len(event.token_ids) != len(flight.samplers):
            self._drop(f"{len(event.token_ids)} tokens for {len(flight.samplers)} sequences")
            return
        self._land(flight)
        logprobs = event.logprobs or (None,) * len(event.token_ids)
        actions = self._actions
        eos_token_ids = self._facts.eos_token_ids if self._facts else ()
        for sequence, token_id, logprob in zip(
            flight.samplers, event.token_ids, logprobs, strict=True
        ):
            if sequence.state is State.ENDED:
                continue
            self.num_tokens += 1
            sequence.token_ids.append(token_id)
            if sequence.first_token_s is None:
                sequence.first_token_s = self._now_s
            sequence.last_token_s = self._now_s
            news = EmitTokens(
                request_id=sequence.request_id,
                token_ids=[token_id],
                logprobs=[] if logprob is None else [logprob],
            )
            actions.append(news)
            reason = finish_reason(
                token_id,
                num_generated=len(sequence.token_ids) - sequence.num_prompt_tokens,
                parameters=sequence.sampling,
                eos_token_ids=eos_token_ids,
            )
            if sequence.state is State.RUNNING:
                self._ready.append(sequence)
            else:
                self._waiting_rows += 1  # gave way while its token was on the way
            if reason is not None:
                self._complete(sequence, news, reason)

    def _complete(self, sequence: Sequence, news: EmitTokens, reason: str) -> None:
        news.finish_reason = FinishReason(reason)
        news.usage = sequence.usage(self._now_s)
        self._remove(sequence)
        if self._last_finish_s is not None:
            interval_s = self._now_s - self._last_finish_s
            self._mean_finish_interval_s += 0.05 * (interval_s - self._mean_finish_interval_s)
        self._last_finish_s = self._now_s

    def _land(self, flight: Flight) -> None:
        self._flights.popleft()
        self._num_decode_flights -= flight.has_decodes
        self._returned_id = flight.micro_batch_id
        self._returned_s = self._now_s
        self._mirror.release_slots(flight.micro_batch_id)
        if not flight.overlapped:
            self._policy.observe_round_trip(
                self._now_s - flight.launched_s, rows=flight.rows, pairs=flight.pairs
            )

    # --- scheduling

    def _schedule(self) -> None:
        """Launches micro-batches as long as there is work and room in the pipeline."""
        if self._now_s - self._refreshed_s >= _REFRESH_S:
            self._refresh_policy()
        while True:
            decodes = self._take_decodes()
            chunks = self._take_chunks(decodes)
            if not decodes and not chunks:
                break
            self._launch(decodes, chunks)
        if self._mirror.has_updates and not self._flights:
            self._actions.append(FlushUpdates(updates_S=self._mirror.take_updates()))

    def _refresh_policy(self) -> None:
        self._refreshed_s = self._now_s
        if self._running:
            positions = sum(sequence.num_scheduled for sequence in self._running)
            self._policy.set_context(max(positions / len(self._running), 1.0))
        self._policy.refresh_if_stale()

    def _take_decodes(self) -> list[Sequence]:
        """The next share of the decodes; empty when enough micro-batches carry decodes."""
        ready = self._ready
        while ready:
            num_decodes = len(self._running) - (self._partial is not None)
            target = self._policy.decode_target(num_decodes)
            if self._num_decode_flights >= target:
                break
            share = min(-(-num_decodes // target), self._max_rows, len(ready))
            chosen = [ready.popleft() for _ in range(share)]
            chosen = self._make_room(chosen)
            if chosen:
                return chosen
        return []

    def _make_room(self, chosen: list[Sequence]) -> list[Sequence]:
        """Preempts the youngest until each of `chosen` that needs a block can have one."""
        wanting = [s for s in chosen if s.num_scheduled == s.capacity]
        while len(wanting) > self._mirror.num_free_blocks:
            youngest = max(self._running, key=lambda sequence: sequence.order)
            self._preempt(youngest)
            wanting = [s for s in wanting if s is not youngest]
            chosen = [s for s in chosen if s is not youngest]
        return chosen

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a sequence back to the queue, before all that are younger."""
        self._stop_running(sequence)
        sequence.state = State.WAITING
        sequence.num_scheduled = 0
        self._waiting_rows += len(sequence.token_ids)
        index = 0
        while index < len(self._waiting) and self._waiting[index].order < sequence.order:
            index += 1
        self._waiting.insert(index, sequence)
        self.num_preemptions += 1

    def _take_chunks(self, decodes: list[Sequence]) -> list[Chunk]:
        """Prompt rows for the next micro-batch, as many as time and space allow."""
        partial = self._partial
        backlog_rows = self._waiting_rows + (partial.num_unscheduled if partial else 0)
        space = self._max_rows - len(decodes)
        if backlog_rows == 0 or space == 0:
            return []
        policy = self._policy
        plan = policy.prefill_plan(
            backlog_rows=backlog_rows,
            num_decodes=len(self._running) - (partial is not None),
            free_kv=self._mirror.free_share,
            max_rows=self._max_rows,
        )
        if not decodes and len(self._flights) >= plan.in_flight:
            return []
        pairs = sum(sequence.num_scheduled for sequence in decodes)
        budget_s = plan.micro_batch_s - policy.seconds(len(decodes), pairs)
        return self._fill(budget_s, space)

    def _fill(self, budget_s: float, space: int) -> list[Chunk]:
        policy, least = self._policy, self._settings.policy.min_chunk_rows
        chunks: list[Chunk] = []
        while space > 0:
            if chunks and policy.chunk_rows(budget_s, 0) < least:
                break
            sequence = self._partial or self._admit_next()
            if sequence is None:
                break
            rows = max(policy.chunk_rows(budget_s, sequence.num_scheduled), least)
            if rows + least > sequence.num_unscheduled:
                rows = sequence.num_unscheduled
            rows = min(rows, space, sequence.num_unscheduled)
            chunks.append(Chunk(sequence, rows))
            pairs = rows * (sequence.num_scheduled + 0.5 * rows)
            budget_s -= policy.seconds(rows, pairs) - policy.seconds(0, 0)
            space -= rows
            self._partial = sequence
            if rows < sequence.num_unscheduled:
                break
            self._partial = None
        return chunks

    def _admit_next(self) -> Sequence | None:
        """Takes the head of the queue in, if there are a slot and blocks for it.

        Beyond the prompt's blocks every second running sequence keeps one to grow into, or
        the newcomer would be preempted at once.
        """
        if not self._waiting or not self._mirror.has_free_slot:
            return None
        sequence = self._waiting[0]
        if sequence.last_micro_batch_id > self._returned_id:
            return None  # gave way, and its last token has yet to return
        wanted = self._mirror.blocks_for(len(sequence.token_ids)) + len(self._running) // 2
        if wanted > self._mirror.num_free_blocks:
            return None
        self._waiting.popleft()
        self._waiting_rows -= len(sequence.token_ids)
        self._mirror.start(sequence)
        sequence.state = State.RUNNING
        self._running.add(sequence)
        if sequence.scheduled_s is None:
            sequence.scheduled_s = self._now_s
            self.num_prompt_tokens += sequence.num_prompt_tokens
        return sequence

    def _launch(self, decodes: list[Sequence], chunks: list[Chunk]) -> None:
        micro_batch_id = self._next_id
        self._next_id += 1
        firsts = [sequence.num_scheduled for sequence in decodes]
        token_ids = [sequence.token_ids[-1] for sequence in decodes]
        num_rows = [1] * len(decodes)
        pairs = sum(firsts)
        for sequence in decodes:
            if sequence.num_scheduled == sequence.capacity:
                self._mirror.grow(sequence, 1)
            sequence.num_scheduled += 1
            sequence.last_micro_batch_id = micro_batch_id
        slots = [sequence.slot for sequence in decodes]
        samples = [True] * len(decodes)
        samplers = decodes.copy()
        for sequence, rows in chunks:
            first = sequence.num_scheduled
            firsts.append(first)
            token_ids += sequence.token_ids[first : first + rows]
            num_rows.append(rows)
            slots.append(sequence.slot)
            pairs += rows * first + rows * rows // 2
            sequence.num_scheduled = first + rows
            sequence.last_micro_batch_id = micro_batch_id
            samples.append(sequence.num_unscheduled == 0)
            if samples[-1]:
                samplers.append(sequence)
        self._actions.append(
            RunMicroBatch(
                micro_batch_id=micro_batch_id,
                slots_R=slots,
                first_positions_R=firsts,
                num_rows_R=num_rows,
                samples_R=samples,
                token_ids_T=token_ids,
                updates_S=self._mirror.take_updates(),
            )
        )
        self._take_off(
            Flight(
                micro_batch_id=micro_batch_id,
                launched_s=self._now_s,
                samplers=samplers,
                rows=len(token_ids),
                pairs=pairs,
                has_decodes=bool(decodes),
                overlapped=bool(self._flights),
            )
        )

    def _take_off(self, flight: Flight) -> None:
        if self._flights:
            self._flights[-1].overlapped = True
        self._flights.append(flight)
        self._history.add(flight)
        self._num_decode_flights += flight.has_decodes
