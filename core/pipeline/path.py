"""A path: replicas that hold the whole model, the sequences that run on it, and what is in flight.

A micro-batch mixes decodes and prefill chunks; what restores sequences goes by itself, before
them. How many micro-batches carry decodes at a time, and how much prefill rides along, follows
from measured times (`policy.py`).

Replicas perform orders first in, first out; results of whole paths return in the order of
launching.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from core.errors import ProtocolViolation
from core.pipeline import restore
from core.pipeline.actions import Action, RunMicroBatch
from core.pipeline.batch import NO_TOKEN, PositionLogprobs
from core.pipeline.cut import Cut
from core.pipeline.decode import Decodes
from core.pipeline.events import PipelineFacts, TokensSampled
from core.pipeline.flights import Chunk, Flight, Sampler, Traffic
from core.pipeline.mirror import Mirror
from core.pipeline.policy import InFlightPolicy, PolicySettings
from core.pipeline.prefill import Prefill, num_pairs
from core.pipeline.replica import Replica
from core.pipeline.restore import Restoring
from core.pipeline.sequences import Sequence
from core.pipeline.speculation import Speculation, count_accepted

if TYPE_CHECKING:
    from core.pipeline.admission import Admission

_REFRESH_S = 0.5  # how often the policy looks at new measurements


class Landed(NamedTuple):
    """What a micro-batch has brought one sequence."""

    sequence: Sequence
    token_ids: List[int]
    logprobs: List[PositionLogprobs]  # as long as token_ids where asked for, else empty


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What all paths of a pipeline use together."""

    facts: PipelineFacts
    settings: PolicySettings
    traffic: Traffic
    mirror: Mirror
    admission: Admission
    speculation: Speculation
    ids: Iterator[int]  # numbers micro-batches, upwards


class Path:
    """Launches micro-batches and takes them back."""

    def __init__(self, replicas: tuple[Replica, ...], shared: Shared, *, now_s: float) -> None:
        self.replicas = replicas
        self.shared = shared
        self.cut = Cut(tuple(replica.part for replica in replicas))
        self.policy = InFlightPolicy(
            [replica.times for replica in replicas],
            shared.settings,
            gains_alone=[replica.facts.gain_alone for replica in replicas],
        )
        self.num_kv_blocks = min(replica.facts.num_kv_blocks for replica in replicas)
        self.max_rows = min(replica.facts.max_rows for replica in replicas)
        self.running: set[Sequence] = set()
        self.is_closing = False  # launches nothing more; its sequences leave
        self._ids = tuple(replica.id for replica in replicas)
        self._decodes = Decodes(self)
        self._prefill = Prefill(self, min_chunk_rows=shared.settings.min_chunk_rows)
        self._restoring = Restoring(self)
        self._flights: deque[Flight] = deque()  # those through the whole path
        self.returned_s = now_s
        self._refreshed_s = now_s

    @property
    def is_left(self) -> bool:
        """Whether sequences shall leave one of its replicas."""
        return any(replica.is_left for replica in self.replicas)

    @property
    def num_in_flight(self) -> int:
        """Micro-batches through the whole path."""
        return len(self._flights)

    @property
    def num_launched(self) -> int:
        """Micro-batches of this path, those that restore included."""
        return len(self._flights) + self._restoring.num_flights

    @property
    def num_decodes(self) -> int:
        """Sequences that generate: their prompts are computed or on their way."""
        num_others = len(self._prefill.partial) + len(self._restoring.backlog)
        return len(self.running) - num_others

    @property
    def num_own_rows(self) -> int:
        """Rows of prompts taken in, or to be restored, that are not scheduled."""
        return self._prefill.num_rows + self._restoring.num_rows

    @property
    def num_backlog_rows(self) -> int:
        """Rows of prompts that are not scheduled, the queue's included."""
        return self._prefill.num_rows + self.shared.admission.num_rows_for(self)

    @property
    def free_share(self) -> float:
        """Share of the KV blocks that is free on the scarcest replica."""
        allocators = [replica.allocator for replica in self.replicas]
        return min(a.num_free / a.num_blocks for a in allocators)

    # --- who runs here

    def take_in(self, sequence: Sequence) -> None:
        """A sequence with seats here begins to run."""
        sequence.path = self
        self.running.add(sequence)

    def go_on(self, sequence: Sequence) -> None:
        """What follows the first `num_scheduled` positions can be scheduled."""
        if sequence.num_unscheduled == 1:
            self._decodes.ready.append(sequence)
        else:
            self._prefill.partial.append(sequence)

    @property
    def has_newcomers(self) -> bool:
        """Whether sequences of lost paths are about to come."""
        return self._restoring.has_newcomers

    def expect(self, sequence: Sequence) -> None:
        """A stranded sequence will come here, when what it lacks can be sent again."""
        sequence.destination = self
        self._restoring.expect(sequence)

    def forget_newcomers(self) -> None:
        """They will be told anew where to go."""
        self._restoring.forget_newcomers()

    def make_ready(self, sequence: Sequence) -> None:
        """Its tokens came back: what follows the last of them can be scheduled."""
        sequence.num_scheduled = len(sequence.token_ids) - 1
        self._decodes.ready.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence runs here no more; what is in flight of it may still land."""
        self.running.remove(sequence)
        sequence.path = None
        for queue in (self._prefill.partial, self._decodes.ready, self._restoring.backlog):
            if sequence in queue:
                queue.remove(sequence)
                break

    # --- what comes back

    def land(self, flight: Flight, event: TokensSampled, now_s: float) -> list[Landed]:
        """Takes a micro-batch back; returns what it brings to whom, in order.

        Raises ProtocolViolation when it is out of order or its tokens are too few, too many or not
        of the vocabulary.
        """
        _check_tokens(event, flight.num_samples, vocab_size=self.shared.facts.vocab_size)
        if not flight.restored and self._flights[0] is not flight:
            raise ProtocolViolation(
                f"micro-batch {event.micro_batch_id} returned before "
                f"{self._flights[0].micro_batch_id}"
            )
        self.returned_s = now_s
        self._forget(flight)
        self.shared.traffic.land(flight)
        if flight.restored:
            restore.land(flight)
            return []
        if flight.found_empty:
            self.policy.observe_round_trip(
                now_s - flight.launched_s, rows=flight.rows, pairs=flight.pairs
            )
        if not flight.overlapped and flight.rows == flight.num_samples:
            self.policy.observe_decode(now_s - flight.launched_s, rows=flight.rows)
        return self._verify(flight, event)

    def drop(self, flight: Flight) -> None:
        """A micro-batch will not return."""
        self._forget(flight)
        self.shared.traffic.drop(flight)
        if flight.restored:
            restore.drop(flight)

    def _forget(self, flight: Flight) -> None:
        if flight.restored:
            self._restoring.num_flights -= 1
            return
        self._flights.remove(flight)
        self._decodes.num_flights -= flight.num_decodes > 0

    def _verify(self, flight: Flight, event: TokensSampled) -> list[Landed]:
        """Of each sequence's tokens, those whose predecessors had been guessed right."""
        landed, first = [], 0
        for sequence, draft in flight.samplers:
            end = first + 1
            if draft:
                end += count_accepted(draft, event.token_ids[first:])
                self.shared.speculation.num_accepted += end - first - 1
            if flight.micro_batch_id > sequence.void_id:
                logprobs = [entry for entry in event.logprobs[first:end] if entry is not None]
                landed.append(Landed(sequence, event.token_ids[first:end], logprobs))
            first += 1 + len(draft)
        return landed

    # --- what goes out

    def schedule(self, now_s: float) -> list[Action]:
        """Launches micro-batches as long as there is work and room in the pipeline."""
        actions: list[Action] = []
        if self.is_closing:
            return actions
        if now_s - self._refreshed_s >= _REFRESH_S:
            self._refresh_policy(now_s)
        while True:
            restoring = self._restoring.launch(now_s)
            actions += restoring
            decodes = self._decodes.take()
            chunks = self._prefill.take(decodes, now_s)
            if decodes or chunks:
                actions.append(self._launch(decodes, chunks, now_s))
            elif not restoring:
                return actions

    def _refresh_policy(self, now_s: float) -> None:
        self._refreshed_s = now_s
        if self.running:
            positions = sum(sequence.num_scheduled for sequence in self.running)
            self.policy.set_context(max(positions / len(self.running), 1.0))
        self.policy.refresh()

    def _launch(self, decodes: list[Sampler], chunks: list[Chunk], now_s: float) -> RunMicroBatch:
        micro_batch_id = next(self.shared.ids)
        pairs = num_pairs(decodes)
        counts = [1 + len(draft) for _, draft in decodes]
        action = RunMicroBatch(
            micro_batch_id=micro_batch_id,
            path=self._ids,
            first_stage=0,
            replays=False,
            slots_R=[sequence.slot for sequence, _ in decodes],
            first_positions_R=[sequence.num_scheduled for sequence, _ in decodes],
            num_rows_R=counts,
            num_samples_R=counts.copy(),
            token_ids_T=[
                token_id
                for sequence, draft in decodes
                for token_id in (sequence.token_ids[-1], *draft)
            ],
            updates_P=[replica.take_updates() for replica in self.replicas],
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
        found_empty = not any(replica.flights for replica in self.replicas)
        self._take_off(
            Flight(
                micro_batch_id=micro_batch_id,
                path=self,
                replicas=self.replicas,
                launched_s=now_s,
                rows=len(action.token_ids_T),
                pairs=pairs,
                overlapped=self.num_launched > 0,
                found_empty=found_empty,
                samplers=samplers,
                num_samples=sum(action.num_samples_R),
                num_decodes=len(decodes),
                chunks=chunks,
                first_positions_R=action.first_positions_R,
                promises=self._prefill.promises if chunks else [],
            )
        )
        return action

    def _take_off(self, flight: Flight) -> None:
        if self._flights:
            self._flights[-1].overlapped = True
        self._flights.append(flight)
        self.shared.traffic.add(flight)
        self._decodes.num_flights += flight.num_decodes > 0


def _add_chunk(action: RunMicroBatch, sequence: Sequence, rows: int) -> None:
    first = sequence.num_scheduled
    sequence.num_scheduled = first + rows
    sequence.last_micro_batch_id = action.micro_batch_id
    action.slots_R.append(sequence.slot)
    action.first_positions_R.append(first)
    action.num_rows_R.append(rows)
    action.num_samples_R.append(int(sequence.num_unscheduled == 0))
    action.token_ids_T += sequence.token_ids[first : first + rows]


def _check_tokens(event: TokensSampled, num_samples: int, *, vocab_size: int) -> None:
    """What a stage returns is from outside."""
    num_tokens, num_logprobs = len(event.token_ids), len(event.logprobs)
    if num_tokens != num_samples or num_logprobs not in (0, num_samples):
        raise ProtocolViolation(
            f"micro-batch {event.micro_batch_id} returned {num_tokens} tokens and {num_logprobs} "
            f"log probabilities for {num_samples} rows"
        )
    if max(event.token_ids, default=0) < vocab_size:
        return
    beyond = [id for id in event.token_ids if id >= vocab_size and id != NO_TOKEN]
    if beyond:
        raise ProtocolViolation(
            f"micro-batch {event.micro_batch_id} returned the token {beyond[0]} of a vocabulary of "
            f"{vocab_size}"
        )
