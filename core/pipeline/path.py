"""A path: one replica of every stage, the sequences that run on it, and what is in flight.

A micro-batch mixes decodes and prefill chunks. A decode is the row of a sequence's last token
and rows that verify guesses; those that came back first go first. How many micro-batches carry
decodes at a time, and how much prefill rides along, follows from measured times (`policy.py`).

Stages perform orders first in, first out; results return in the order of launching.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import NamedTuple

from core.errors import ProtocolViolation
from core.pipeline.actions import Action, FlushUpdates, RunMicroBatch
from core.pipeline.batch import PositionLogprobs
from core.pipeline.events import PipelineFacts, StageReported, TokensSampled
from core.pipeline.flights import Flight, FlightHistory, Sampler
from core.pipeline.mirror import PathMirror
from core.pipeline.policy import InFlightPolicy, PolicySettings
from core.pipeline.sequences import Sequence, State
from core.pipeline.speculation import Speculation, count_accepted
from core.pipeline.waiting import WaitingQueue

_REFRESH_S = 0.5  # how often the policy looks at new measurements


class Chunk(NamedTuple):
    """Prompt rows of one sequence in the next micro-batch."""

    sequence: Sequence
    rows: int


class Landed(NamedTuple):
    """What a micro-batch has brought one sequence."""

    sequence: Sequence
    token_ids: List[int]
    logprobs: List[PositionLogprobs]  # as long as token_ids where asked for, else empty


class Path:
    """Admits sequences from the queue, launches micro-batches and takes them back."""

    def __init__(
        self,
        facts: PipelineFacts,
        *,
        waiting: WaitingQueue,
        speculation: Speculation,
        ids: Iterator[int],
        settings: PolicySettings,
        shares_prefixes: bool,
        now_s: float,
    ) -> None:
        """`ids` numbers the micro-batches of all paths, upwards."""
        num_stages = len(facts.stages)
        self.facts = facts
        self.mirror = PathMirror(facts, shares_prefixes=shares_prefixes)
        self.running: set[Sequence] = set()
        self.num_preemptions = 0
        self._waiting = waiting
        self._speculation = speculation
        self._ids = ids
        self._policy = InFlightPolicy(num_stages, settings)
        self._min_chunk_rows = settings.min_chunk_rows
        self._max_rows = min(stage.max_rows for stage in facts.stages)
        self._ready: deque[Sequence] = deque()  # decodes whose token came back
        self._partial: Sequence | None = None  # admitted, prompt not wholly scheduled
        self._flights: deque[Flight] = deque()
        self._history = FlightHistory(num_stages)
        self._num_decode_flights = 0
        self._returned_id = 0
        self._returned_s = now_s
        self._refreshed_s = now_s

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def num_decodes(self) -> int:
        """Sequences that generate: their prompts are computed or on their way."""
        return len(self.running) - (self._partial is not None)

    def seconds_without_progress(self, now_s: float) -> float:
        """How long nothing has returned although something is in flight."""
        if not self._flights:
            return 0.0
        return now_s - max(self._flights[0].launched_s, self._returned_s)

    # --- what comes back

    def land(self, event: TokensSampled, now_s: float) -> list[Landed]:
        """Takes a micro-batch back; returns what it brings to whom, in order.

        Empty for one that this path did not launch: it was launched by a path that was lost.
        Raises ProtocolViolation when it is out of order or its tokens are too few or many.
        """
        if not self._flights or event.micro_batch_id < self._flights[0].micro_batch_id:
            return []
        flight = self._flights[0]
        if event.micro_batch_id != flight.micro_batch_id:
            raise ProtocolViolation(
                f"micro-batch {event.micro_batch_id} returned before {flight.micro_batch_id}"
            )
        num_samples = sum(sampler.num_samples for sampler in flight.samplers)
        if len(event.token_ids) != num_samples:
            raise ProtocolViolation(
                f"micro-batch {event.micro_batch_id} returned {len(event.token_ids)} tokens "
                f"for {num_samples} rows"
            )
        self._flights.popleft()
        self._num_decode_flights -= flight.has_decodes
        self._returned_id = flight.micro_batch_id
        self._returned_s = now_s
        self.mirror.release_slots(flight.micro_batch_id)
        if flight.found_empty:
            self._policy.observe_round_trip(
                now_s - flight.launched_s, rows=flight.rows, pairs=flight.pairs
            )
        if not flight.overlapped and flight.rows == num_samples:
            self._policy.observe_decode(now_s - flight.launched_s, rows=flight.rows)
        return self._verify(flight, event)

    def _verify(self, flight: Flight, event: TokensSampled) -> list[Landed]:
        """Of each sequence's tokens, those whose predecessors had been guessed right."""
        landed, first = [], 0
        for sequence, draft in flight.samplers:
            end = first + 1
            if draft:
                end += count_accepted(draft, event.token_ids[first:])
                self._speculation.num_accepted += end - first - 1
            logprobs = [entry for entry in event.logprobs[first:end] if entry is not None]
            landed.append(Landed(sequence, event.token_ids[first:end], logprobs))
            first += 1 + len(draft)
        return landed

    def make_ready(self, sequence: Sequence) -> None:
        """Its tokens came back: what follows the last of them can be scheduled."""
        sequence.num_scheduled = len(sequence.token_ids) - 1
        self._ready.append(sequence)

    def observe(self, event: StageReported) -> None:
        """Learns from a stage's times."""
        alone, overlapped = self._history.match(
            event.stage_index, event.batch_rows, event.batch_seconds
        )
        for is_overlapped, seen in ((False, alone), (True, overlapped)):
            if seen.rows:
                self._policy.observe_stage(
                    event.stage_index,
                    overlapped=is_overlapped,
                    rows=seen.rows,
                    pairs=seen.pairs,
                    seconds=seen.seconds,
                )

    def remove(self, sequence: Sequence) -> None:
        """Takes slot and blocks of a running sequence back; what is in flight is dropped."""
        self.running.remove(sequence)
        if sequence is self._partial:
            self._partial = None
        elif sequence in self._ready:
            self._ready.remove(sequence)
        self.mirror.end(sequence, returned_id=self._returned_id)

    # --- what goes out

    def schedule(self, now_s: float) -> list[Action]:
        """Launches micro-batches as long as there is work and room in the pipeline."""
        if now_s - self._refreshed_s >= _REFRESH_S:
            self._refresh_policy(now_s)
        actions: list[Action] = []
        while True:
            decodes = self._take_decodes()
            chunks = self._take_chunks(decodes, now_s)
            if not decodes and not chunks:
                break
            actions.append(self._launch(decodes, chunks, now_s))
        if self.mirror.has_updates and not self._flights:
            actions.append(FlushUpdates(updates_S=self.mirror.take_updates()))
        return actions

    def _refresh_policy(self, now_s: float) -> None:
        self._refreshed_s = now_s
        if self.running:
            positions = sum(sequence.num_scheduled for sequence in self.running)
            self._policy.set_context(max(positions / len(self.running), 1.0))
        self._policy.refresh_if_stale()

    def _take_decodes(self) -> list[Sampler]:
        """The next share of the decodes; empty when enough micro-batches carry decodes."""
        ready = self._ready
        while ready:
            target = self._policy.decode_target(self.num_decodes)
            if self._num_decode_flights >= target:
                break
            share = min(-(-self.num_decodes // target), self._max_rows, len(ready))
            chosen = self._make_room([ready.popleft() for _ in range(share)])
            if chosen:
                return self._guess(chosen)
        return []

    def _guess(self, chosen: list[Sequence]) -> list[Sampler]:
        """Adds guesses, unless prompts wait for the same rows."""
        decodes = []
        space = self._max_rows - len(chosen)
        stakes = self._policy.stakes(self.num_decodes, rows=len(chosen))
        if self._partial or len(self._waiting) or not self._speculation.pays(stakes):
            space = 0
        for sequence in chosen:
            draft: list[int] = []
            if space > 0:
                most = min(space, self._room_to_guess(sequence))
                draft = self._speculation.draft(sequence, stakes, most=most)
                space -= len(draft)
                self._grow(sequence, sequence.num_scheduled + 1 + len(draft))
            decodes.append(Sampler(sequence, draft))
        return decodes

    def _room_to_guess(self, sequence: Sequence) -> int:
        """Positions beyond its next row that cost no other sequence its place."""
        spare_blocks = max(self.mirror.num_free_blocks - len(self.running), 0)
        spare = spare_blocks * self.facts.kv_block_size
        return sequence.capacity + spare - sequence.num_scheduled - 1

    def _grow(self, sequence: Sequence, num_positions: int) -> None:
        missing = num_positions - sequence.capacity
        if missing > 0:
            self.mirror.grow(sequence, -(-missing // self.facts.kv_block_size))

    def _make_room(self, chosen: list[Sequence]) -> list[Sequence]:
        """Gives a block to each of `chosen` that needs one, at the cost of the youngest."""
        wanting = [s for s in chosen if s.num_scheduled == s.capacity]
        while len(wanting) > self.mirror.num_free_blocks:
            youngest = max(self.running, key=lambda sequence: sequence.order)
            self._preempt(youngest)
            wanting = [s for s in wanting if s is not youngest]
            chosen = [s for s in chosen if s is not youngest]
        for sequence in wanting:
            self.mirror.grow(sequence, 1)
        return chosen

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a sequence back to the queue, to be computed again, output so far included."""
        self.remove(sequence)
        sequence.state = State.WAITING
        sequence.num_scheduled = 0
        self._waiting.put_back(sequence)
        self.num_preemptions += 1

    def _take_chunks(self, decodes: list[Sampler], now_s: float) -> list[Chunk]:
        """Prompt rows for the next micro-batch, as many as time and space allow."""
        partial = self._partial
        backlog_rows = self._waiting.num_rows + (partial.num_unscheduled if partial else 0)
        rows = sum(decode.num_samples for decode in decodes)
        space = self._max_rows - rows
        if backlog_rows == 0 or space == 0:
            return []
        plan = self._policy.prefill_plan(
            backlog_rows=backlog_rows,
            num_decodes=self.num_decodes,
            free_kv=self.mirror.free_share,
            max_rows=self._max_rows,
        )
        if not decodes and len(self._flights) >= plan.in_flight:
            return []
        budget_s = plan.micro_batch_s - self._policy.seconds(rows, _pairs(decodes))
        return self._fill(budget_s, space, now_s)

    def _fill(self, budget_s: float, space: int, now_s: float) -> list[Chunk]:
        """At least one chunk of the least size, so that decodes cannot starve prefill."""
        policy, least = self._policy, self._min_chunk_rows
        chunks: list[Chunk] = []
        while space > 0:
            if chunks and policy.chunk_rows(budget_s, 0) < least:
                break
            sequence = self._partial or self._admit_next(now_s)
            if sequence is None:
                break
            rows = max(policy.chunk_rows(budget_s, sequence.num_scheduled), least)
            if rows + least > sequence.num_unscheduled:
                rows = sequence.num_unscheduled
            rows = min(rows, space)
            chunks.append(Chunk(sequence, rows))
            self.mirror.publish(sequence, num_positions=sequence.num_scheduled + rows)
            pairs = rows * (sequence.num_scheduled + 0.5 * rows)
            budget_s -= policy.seconds(rows, pairs) - policy.seconds(0, 0)
            space -= rows
            if rows < sequence.num_unscheduled:
                self._partial = sequence
                break
            self._partial = None
        return chunks

    def _admit_next(self, now_s: float) -> Sequence | None:
        """Takes the head of the queue in, if there are a slot and blocks for it.

        Beyond the prompt's blocks every second running sequence keeps one to grow into, or
        the newcomer would be preempted at once.
        """
        sequence = self._waiting.head
        if sequence is None:
            return None
        if sequence.last_micro_batch_id > self._returned_id:
            return None  # was preempted, and its last token has yet to return
        if not self.mirror.start(sequence, spare=len(self.running) // 2):
            return None
        self._waiting.pop_head()
        sequence.state = State.RUNNING
        self.running.add(sequence)
        if sequence.scheduled_s is None:
            sequence.scheduled_s = now_s
            sequence.num_cached = sequence.num_found
        return sequence

    def _launch(self, decodes: list[Sampler], chunks: list[Chunk], now_s: float) -> RunMicroBatch:
        micro_batch_id = next(self._ids)
        pairs = _pairs(decodes)
        counts = [decode.num_samples for decode in decodes]
        action = RunMicroBatch(
            micro_batch_id=micro_batch_id,
            slots_R=[sequence.slot for sequence, _ in decodes],
            first_positions_R=[sequence.num_scheduled for sequence, _ in decodes],
            num_rows_R=counts,
            num_samples_R=counts.copy(),
            token_ids_T=[
                token_id
                for sequence, draft in decodes
                for token_id in (sequence.token_ids[-1], *draft)
            ],
            updates_S=self.mirror.take_updates(),
        )
        for sequence, _ in decodes:
            sequence.num_scheduled += 1
            sequence.last_micro_batch_id = micro_batch_id
        samplers = decodes.copy()
        for sequence, rows in chunks:
            pairs += rows * sequence.num_scheduled + rows * rows // 2
            _add_chunk(action, sequence, rows)
            if action.num_samples_R[-1]:
                samplers.append(Sampler(sequence, []))
        self._take_off(
            Flight(
                micro_batch_id=micro_batch_id,
                launched_s=now_s,
                samplers=samplers,
                rows=len(action.token_ids_T),
                pairs=pairs,
                has_decodes=bool(decodes),
                found_empty=not self._flights,
                overlapped=bool(self._flights),
            )
        )
        return action

    def _take_off(self, flight: Flight) -> None:
        if self._flights:
            self._flights[-1].overlapped = True
        self._flights.append(flight)
        self._history.add(flight)
        self._num_decode_flights += flight.has_decodes


def _pairs(decodes: list[Sampler]) -> int:
    """Rows looking at positions."""
    return sum(
        sequence.num_scheduled * (1 + len(draft)) + len(draft) * (len(draft) + 1) // 2
        for sequence, draft in decodes
    )


def _add_chunk(action: RunMicroBatch, sequence: Sequence, rows: int) -> None:
    first = sequence.num_scheduled
    sequence.num_scheduled = first + rows
    sequence.last_micro_batch_id = action.micro_batch_id
    action.slots_R.append(sequence.slot)
    action.first_positions_R.append(first)
    action.num_rows_R.append(rows)
    action.num_samples_R.append(int(sequence.num_unscheduled == 0))
    action.token_ids_T += sequence.token_ids[first : first + rows]
