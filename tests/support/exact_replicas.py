"""Replicas of stages that know what every KV position and log entry must contain.

They keep the promises of a real stage and no others: orders are performed first in, first out;
activations travel over links that lose what is under way when they break; abandoned
micro-batches are skipped, their updates are not. What a row becomes depends on its token, on the
weights and on what the KV blocks hold at all earlier positions, so that whatever is stale, missing
or somebody else's changes the row, and the last stage, which knows what rows must be, then
samples GARBAGE. That may happen where micro-batches were abandoned; it must reach nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from core.pipeline.actions import AbandonMicroBatches, FlushUpdates, RunMicroBatch
from core.pipeline.batch import MicroBatch, SequenceUpdates
from core.pipeline.cut import Part
from core.pipeline.events import StageReported, TokensSampled
from tests.support.fake_engine import next_token

NextToken = Callable[[Sequence[int]], int]
GARBAGE = 0  # the token that comes of wrong rows; the fake models never say it


class Row(NamedTuple):
    """An activation: its token, the weights that made it, and a digest of all that went in."""

    token_id: int
    weights: tuple[str, ...]
    digest: int


def first_row(token_id: int) -> Row:
    """What goes into the first stage."""
    return Row(token_id, (), hash((token_id,)))


NOBODYS = Row(GARBAGE, (), 0)  # where nothing has been written


def computed(row: Row, earlier: Sequence[Row], weights: str) -> Row:
    """What a layer makes of `row` at the position behind `earlier`."""
    digest = hash((weights, row.digest, *(other.digest for other in earlier)))
    return Row(row.token_id, (*row.weights, weights), digest)


@lru_cache(maxsize=100_000)
def true_rows(token_ids: tuple[int, ...], weights: tuple[str, ...]) -> tuple[Row, ...]:
    """What layers with these weights must have made of each of `token_ids`."""
    if not weights:
        return tuple(first_row(token_id) for token_id in token_ids)
    if not token_ids:
        return ()
    before = true_rows(token_ids[:-1], weights)
    row = true_rows(token_ids, weights[:-1])[-1]
    earlier = true_rows(token_ids[:-1], weights[:-1])
    return (*before, computed(row, earlier, weights[-1]))


@dataclass(slots=True)
class _Mirrored:
    """A sequence as one replica knows it."""

    block_ids: list[int]
    num_cached: int
    certain: int  # where the next run may begin at the earliest
    length: int  # and at the latest
    counts_tokens: bool = False
    known: list[int] = field(default_factory=list)
    sampled_at: list[int] = field(default_factory=list)  # rows after which it sampled, in order


class ExactEngine:
    """The sequences and KV blocks of one replica, and its log. Refuses what does not fit."""

    def __init__(
        self,
        *,
        num_kv_blocks: int,
        block_size: int,
        is_last: bool,
        weights: Sequence[str] = ("",),
        next_token: NextToken = next_token,
    ) -> None:
        """`weights` of each layer."""
        self.sequences: dict[int, _Mirrored] = {}
        self._num_kv_blocks = num_kv_blocks
        self._block_size = block_size
        self._is_last = is_last
        self._weights = weights
        self._next_token = next_token
        self._kv: dict[tuple[int, int], tuple[Row, ...]] = {}  # what went into each layer
        self._log: dict[tuple[int, int], Row] = {}  # what was sent

    def apply(self, updates: SequenceUpdates) -> None:
        """Ends, starts, blocks, rewinds."""
        for slot in updates.ended_slots:
            assert self.sequences.pop(slot, None), f"slot {slot} ended twice"
        for start in updates.starts:
            assert start.slot not in self.sequences, f"slot {start.slot} started twice"
            assert (start.sampling is not None) == self._is_last
            cached = start.num_cached_positions
            assert cached % self._block_size == 0, "a part of a block is cached"
            sequence = _Mirrored([], cached, cached, cached)
            sequence.counts_tokens = bool(start.sampling and start.sampling.has_penalties)
            sequence.known = list(start.known_token_ids)
            self.sequences[start.slot] = sequence
        self._add_blocks(updates)
        for slot, position in zip(updates.rewind_slots, updates.rewind_positions, strict=True):
            self._rewind(self.sequences[slot], position)

    def _add_blocks(self, updates: SequenceUpdates) -> None:
        held = {block for sequence in self.sequences.values() for block in sequence.block_ids}
        for slot, block in zip(updates.block_slots, updates.block_ids, strict=True):
            sequence = self.sequences[slot]
            is_cached = len(sequence.block_ids) * self._block_size < sequence.num_cached
            assert is_cached or block not in held, f"block {block} is held twice"
            assert block not in sequence.block_ids, f"block {block} is twice in a sequence"
            assert 0 <= block < self._num_kv_blocks, f"block {block} does not exist"
            held.add(block)
            sequence.block_ids.append(block)
        for start in updates.starts:
            covered = len(self.sequences[start.slot].block_ids) * self._block_size
            assert start.num_cached_positions <= covered, "cached positions without a block"

    def _rewind(self, sequence: _Mirrored, position: int) -> None:
        assert position >= sequence.num_cached, "what others computed is to be computed again"
        sequence.length = min(sequence.length, position)
        sequence.certain = min(sequence.certain, position)
        while sequence.sampled_at and sequence.sampled_at[-1] >= position:
            sequence.sampled_at.pop()
            sequence.known.pop()

    def run(self, batch: MicroBatch, rows: Sequence[Row] | None) -> tuple[list[Row], list[int]]:
        """Computes a micro-batch from activations, or from its token ids: rows, and tokens."""
        assert len(set(batch.slots_R.tolist())) == len(batch.slots_R), "two runs of a sequence"
        if rows is None:
            assert len(batch.token_ids_T) == batch.num_rows, "rows without token ids"
            rows = [first_row(int(token_id)) for token_id in batch.token_ids_T]
        assert len(rows) == batch.num_rows, "rows and activations differ in number"
        made: list[Row] = []
        token_ids: list[int] = []
        taken = iter(rows)
        for slot, first, count, num_samples in _runs(batch):
            sequence = self.sequences[slot]
            assert 0 <= num_samples <= count, "more samples than rows"
            assert not (sequence.counts_tokens and num_samples > 1), "guesses with penalties"
            assert sequence.certain <= first <= sequence.length, (
                f"a run begins at {first}, not in {sequence.certain} .. {sequence.length}"
            )
            end = first + count
            assert end <= len(sequence.block_ids) * self._block_size, "no block for a row"
            for position in range(first, end):
                made.append(self._compute(sequence, position, next(taken)))
            sequence.length, sequence.certain = end, end - max(num_samples - 1, 0)
            for position in range(end - num_samples, end):
                token_ids.append(self._sample(sequence, position, made[position - end]))
        return made, token_ids

    def replay(self, batch: MicroBatch) -> list[Row]:
        """Rows as they were sent before."""
        rows = []
        for slot, first, count, num_samples in _runs(batch):
            sequence = self.sequences[slot]
            assert num_samples == 0
            assert first + count <= sequence.length, "it has not computed what it shall replay"
            places = (self._place(sequence, position) for position in range(first, first + count))
            rows += [self._log.get(place, NOBODYS) for place in places]
        return rows

    def _compute(self, sequence: _Mirrored, position: int, row: Row) -> Row:
        place = self._place(sequence, position)
        earlier = self._known_rows(sequence, position)
        inputs = []
        for layer, weights in enumerate(self._weights):
            inputs.append(row)
            row = computed(row, [rows[layer] for rows in earlier], weights)
        self._kv[place] = tuple(inputs)
        if not self._is_last:
            self._log[place] = row
        return row

    def _sample(self, sequence: _Mirrored, position: int, row: Row) -> int:
        prefix = tuple(rows[0].token_id for rows in self._known_rows(sequence, position + 1))
        is_true = row == true_rows(prefix, row.weights)[-1]
        token_id = self._next_token(prefix) if is_true else GARBAGE
        if sequence.counts_tokens:
            assert not is_true or sequence.known == list(prefix), "penalties count other tokens"
            sequence.known.append(token_id)
            sequence.sampled_at.append(position)
        return token_id

    def _known_rows(self, sequence: _Mirrored, end: int) -> list[tuple[Row, ...]]:
        nobodys = (NOBODYS,) * len(self._weights)
        return [self._kv.get(self._place(sequence, p), nobodys) for p in range(end)]

    def _place(self, sequence: _Mirrored, position: int) -> tuple[int, int]:
        return sequence.block_ids[position // self._block_size], position % self._block_size


def _runs(batch: MicroBatch) -> Iterator[tuple[int, int, int, int]]:
    runs = (batch.slots_R, batch.first_positions_R, batch.num_rows_R, batch.num_samples_R)
    return zip(*(run.tolist() for run in runs), strict=True)


class ExactLink:
    """What is under way between two replicas; nothing arrives once it has broken."""

    def __init__(self) -> None:
        self.stands = True
        self.frames: deque[tuple[int, list[Row]]] = deque()

    def send(self, micro_batch_id: int, rows: list[Row]) -> None:
        if self.stands:
            self.frames.append((micro_batch_id, rows))

    def cut(self) -> None:
        self.stands = False
        self.frames.clear()


@dataclass(slots=True, kw_only=True)
class Order:
    """A micro-batch as one replica of its path gets it, or updates alone."""

    updates: SequenceUpdates
    batch: MicroBatch | None = None
    upstream: ExactLink | None = None  # None: from token ids, or the log
    downstream: ExactLink | None = None  # None: it answers


class ExactReplica:
    """A replica with its streams: messages wait in `inbox`, results in `outbox`."""

    def __init__(self, replica_id: int, part: Part, engine: ExactEngine) -> None:
        self.id = replica_id
        self.part = part
        self.engine = engine
        self.inbox: deque[Order | list[int]] = deque()  # orders, and ids to abandon
        self.outbox: deque[TokensSampled | StageReported] = deque()
        self.is_stopped = False  # it lives, and does nothing
        self.performed_id = 0
        self._orders: deque[Order] = deque()
        self._abandoned: set[int] = set()
        self._rows: list[int] = []

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do or say."""
        return not (self.inbox or self._orders or self.outbox)

    def receive(self) -> bool:
        """Takes in one message."""
        if self.is_stopped or not self.inbox:
            return False
        message = self.inbox.popleft()
        if isinstance(message, Order):
            self._orders.append(message)
        else:
            self._abandoned.update(message)
        return True

    def step(self) -> bool:
        """Performs the next order, if what it needs is there."""
        if self.is_stopped or not self._orders:
            return False
        order = self._orders[0]
        batch = order.batch
        if batch is None or batch.id in self._abandoned:
            self._orders.popleft()
            self.engine.apply(order.updates)
            self.performed_id = self.performed_id if batch is None else batch.id
            return True
        rows = None
        if order.upstream is not None:
            rows = self._arrived(order.upstream, batch.id)
            if rows is None:
                return False
        self._orders.popleft()
        self.engine.apply(order.updates)
        self._perform(order, batch, rows)
        self.performed_id = batch.id
        return True

    def report(self) -> None:
        """Says how far it has come."""
        if self.is_stopped:
            return
        rows, self._rows = self._rows, []
        self.outbox.append(
            StageReported(
                replica_id=self.id,
                batch_rows=rows,
                batch_seconds=[0.01] * len(rows),
                performed_id=self.performed_id,
            )
        )

    def _arrived(self, link: ExactLink, batch_id: int) -> list[Row] | None:
        """Rows of a micro-batch, if they are there. None, too, where those of a later one came
        instead: then the sender has abandoned it, and this replica will hear that it shall."""
        while link.frames and link.frames[0][0] in self._abandoned:
            link.frames.popleft()
        if not link.frames or link.frames[0][0] > batch_id:
            return None
        assert link.frames[0][0] == batch_id, "frames that nobody waits for"
        return link.frames.popleft()[1]

    def _perform(self, order: Order, batch: MicroBatch, rows: list[Row] | None) -> None:
        token_ids: list[int] = []
        if batch.replays:
            made = self.engine.replay(batch)
        else:
            made, token_ids = self.engine.run(batch, rows)
            self._rows.append(batch.num_rows)
        if order.downstream is not None:
            order.downstream.send(batch.id, made)
        else:
            self.outbox.append(TokensSampled(micro_batch_id=batch.id, token_ids=token_ids))


class ExactReplicas:
    """All replicas of a pipeline, and the links between them. Performs the scheduler's orders."""

    def __init__(self, *, num_layers: int, block_size: int, next_token: NextToken = next_token):
        self.replicas: dict[int, ExactReplica] = {}  # those that live
        self.links: dict[tuple[int, int], ExactLink] = {}  # those that stand
        self.num_replayed = 0  # micro-batches
        self._num_layers = num_layers
        self._block_size = block_size
        self._next_token = next_token

    def add(self, replica_id: int, *, part: Part, num_kv_blocks: int) -> ExactReplica:
        """Opens a replica."""
        engine = ExactEngine(
            num_kv_blocks=num_kv_blocks,
            block_size=self._block_size,
            is_last=part.end_layer == self._num_layers,
            weights=part.weights,
            next_token=self._next_token,
        )
        replica = self.replicas[replica_id] = ExactReplica(replica_id, part, engine)
        return replica

    def connect(self, upstream_id: int, downstream_id: int) -> None:
        """Opens a link."""
        assert (upstream_id, downstream_id) not in self.links
        self.links[upstream_id, downstream_id] = ExactLink()

    def cut(self, upstream_id: int, downstream_id: int) -> None:
        """Breaks a link."""
        self.links.pop((upstream_id, downstream_id)).cut()

    def kill(self, replica_id: int) -> ExactReplica:
        """Ends a replica and its links."""
        for link in [link for link in self.links if replica_id in link]:
            self.cut(*link)
        return self.replicas.pop(replica_id)

    def perform(self, action: RunMicroBatch | FlushUpdates | AbandonMicroBatches) -> None:
        """Sends orders; those to dead replicas and over broken links are lost."""
        match action:
            case RunMicroBatch():
                self._run(action)
            case FlushUpdates():
                self._send(action.replica_id, Order(updates=action.updates))
            case AbandonMicroBatches():
                self._send(action.replica_id, action.micro_batch_ids)

    def _run(self, action: RunMicroBatch) -> None:
        self.num_replayed += action.replays
        path = action.path
        # An order over a link that has broken names it all the same.
        links = [self.links.get(pair, _BROKEN) for pair in pairwise(path)]
        for number, replica_id in enumerate(path):
            batch = action.for_replica(number)
            order = Order(
                updates=batch.updates,
                batch=batch,
                upstream=links[number - 1] if number else None,
                downstream=links[number] if number < len(links) else None,
            )
            self._send(replica_id, order)

    def _send(self, replica_id: int, message: Order | list[int]) -> None:
        if replica_id in self.replicas:
            self.replicas[replica_id].inbox.append(message)


_BROKEN = ExactLink()
_BROKEN.cut()
