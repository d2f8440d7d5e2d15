"""Gives replicas that are new to sequences what others of the path have: keys, values and log.

The replica before a run of new ones sends what it sent when it computed these positions, from
its log; the new ones compute them. Where the run begins with the first stage, it computes from
token ids. The last one of the run answers, without tokens.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from core.pipeline.actions import Action, FlushUpdates, RunMicroBatch
from core.pipeline.flights import Flight, Promise, Restored
from core.pipeline.replica import Replica
from core.pipeline.sequences import Piece, Sequence

if TYPE_CHECKING:
    from core.pipeline.path import Path

# Micro-batches that restore, in flight at a time: while one is computed the next one is there.
_MOST_FLIGHTS = 3
# No fewer in one, unless there are no more.
_LEAST_ROWS = 16

_Turn = tuple[int, int, int]  # higher priority first, then what is soon restored, then who is older


class Restoring:
    """Sequences that come to a path from others, and cannot go on before something has been sent
    again.

    They come one by one, each when all that the one before lacks has been launched: so it finds
    what that one has restored of a common beginning. Within a priority the shortest come first,
    which makes the mean pause the shortest (W. E. Smith, Naval Research Logistics Quarterly 3,
    1956). Pieces of several that lack the same stages share a micro-batch.
    """

    def __init__(self, path: Path) -> None:
        self._newcomers: list[tuple[_Turn, Sequence]] = []  # a heap; some have ended meanwhile
        self.backlog: deque[Sequence] = deque()  # those that came, and lack something
        self.num_flights = 0
        self._path = path
        self._shared = path.shared

    @property
    def has_newcomers(self) -> bool:
        return bool(self._newcomers)

    def expect(self, sequence: Sequence) -> None:
        """One will come, in its turn."""
        turn = (-sequence.priority, sequence.num_scheduled, sequence.order)
        heapq.heappush(self._newcomers, (turn, sequence))

    def forget_newcomers(self) -> None:
        """They will not come, or be announced again."""
        self._newcomers.clear()

    @property
    def num_rows(self) -> int:
        """Rows that are not scheduled, or more."""
        own = sum(piece.end - piece.first for s in self.backlog for piece in s.pieces)
        return own + sum(sequence.num_scheduled for _, sequence in self._newcomers)

    def launch(self, now_s: float) -> list[Action]:
        """The next micro-batch that restores, if there is work and not enough is in flight.

        Sequences of which nothing is left to restore go on at once: what they launch follows
        behind.
        """
        if self.num_flights >= _MOST_FLIGHTS or not (self.backlog or self._newcomers):
            return []
        load = self._load()
        actions: list[Action] = [] if load is None else [self._launch(load, now_s)]
        # Who came begins, or goes back, before anything else can happen to it.
        for replica in self._path.replicas:
            if replica.has_news:
                updates = replica.take_updates()
                actions.append(FlushUpdates(replica_id=replica.id, updates=updates))
        return actions

    def _load(self) -> _Load | None:
        """Pieces of those whose turn it is that lack exactly the same stages, as far as there is
        space."""
        load: _Load | None = None
        while load is None or load.space > 0:
            sequence = self._next()
            if sequence is None:
                break
            piece = sequence.pieces[0]
            if load is None:
                load = _Load(piece, self._most_rows(piece))
            elif not load.takes(sequence, piece):
                break
            end = load.add(sequence, piece)
            promise = self._shared.mirror.publish_restored(sequence, piece._replace(end=end))
            if promise is not None:
                load.promises.append(promise)
            sequence.num_restores += 1
            if end < piece.end:
                sequence.pieces[0] = piece._replace(first=end)
                continue
            sequence.pieces.popleft()
            if not sequence.pieces:
                self.backlog.popleft()
                self._path.go_on(sequence)
        return load

    def _next(self) -> Sequence | None:
        """The sequence to restore now, at the head of the backlog."""
        while not self.backlog and self._newcomers:
            _, sequence = heapq.heappop(self._newcomers)
            if sequence.destination is not self._path:
                continue
            if not self._shared.admission.move(sequence, self._path):
                continue
            if sequence.pieces:
                self.backlog.append(sequence)
            else:
                self._path.go_on(sequence)
        return self.backlog[0] if self.backlog else None

    def _launch(self, load: _Load, now_s: float) -> RunMicroBatch:
        path = self._path
        replicas = path.replicas[load.sender : load.end_stage]
        action = load.action(next(self._shared.ids), replicas)
        rows, firsts = action.num_rows_R, action.first_positions_R
        flight = Flight(
            micro_batch_id=action.micro_batch_id,
            path=path,
            replicas=replicas,
            launched_s=now_s,
            rows=sum(rows),
            pairs=sum(n * first + n * n // 2 for n, first in zip(rows, firsts, strict=True)),
            overlapped=path.num_launched > 0,
            replays=action.replays,
            promises=load.promises,
            restored=load.restored,
        )
        self.num_flights += 1
        self._shared.traffic.add(flight)
        return action

    def _most_rows(self, piece: Piece) -> int:
        """Rows that hold the decodes of others up no longer than prompts may."""
        path = self._path
        plan = path.policy.prefill_plan(
            backlog_rows=max(self.num_rows, 1),
            num_decodes=max(path.num_decodes, 1),  # who is restored generates right behind it
            free_kv=1.0,
            max_rows=path.max_rows,
        )
        rows = min(
            replica.times.overlapped.rows_within(plan.micro_batch_s, piece.first)
            for replica in path.replicas[piece.first_stage : piece.end_stage]
        )
        return min(max(rows, _LEAST_ROWS), path.max_rows)


class _Load:
    """What a micro-batch restores: the runs of several sequences on the same stages."""

    def __init__(self, piece: Piece, space: int) -> None:
        self.first_stage, self.end_stage = piece.first_stage, piece.end_stage
        self.sender = max(piece.first_stage - 1, 0)
        self.space = space  # rows that it can still take
        self.restored: list[Restored] = []
        self.promises: list[Promise] = []
        self._runs: list[tuple[int, int, int]] = []  # slot, first position, rows
        self._token_ids: list[int] = []

    def takes(self, sequence: Sequence, piece: Piece) -> bool:
        """Whether the piece is of the same stages, and not a further run of the same sequence."""
        is_same = (piece.first_stage, piece.end_stage) == (self.first_stage, self.end_stage)
        return is_same and self.restored[-1].sequence is not sequence

    def add(self, sequence: Sequence, piece: Piece) -> int:
        """Takes rows of a piece, as many as there is space for; returns where they end."""
        rows = min(self.space, piece.end - piece.first)
        self.space -= rows
        end = piece.first + rows
        self._runs.append((sequence.slot, piece.first, rows))
        if self.first_stage == 0:
            self._token_ids += sequence.token_ids[piece.first : end]
        seats = sequence.seats[self.first_stage : self.end_stage]
        self.restored.append(Restored(sequence, seats, end))
        return end

    def action(self, micro_batch_id: int, replicas: tuple[Replica, ...]) -> RunMicroBatch:
        return RunMicroBatch(
            micro_batch_id=micro_batch_id,
            path=tuple(replica.id for replica in replicas),
            first_stage=self.sender,
            replays=self.first_stage > 0,
            slots_R=[slot for slot, _, _ in self._runs],
            first_positions_R=[first for _, first, _ in self._runs],
            num_rows_R=[rows for _, _, rows in self._runs],
            num_samples_R=[0] * len(self._runs),
            token_ids_T=self._token_ids,
            updates_P=[replica.take_updates() for replica in replicas],
        )


def land(flight: Flight) -> None:
    """Notes what a micro-batch has restored."""
    for sequence, seats, end in flight.restored:
        sequence.num_restores -= 1
        for seat in seats:
            # A later one may have returned sooner: it was answered by another replica.
            seat.num_restored = max(seat.num_restored, end)


def drop(flight: Flight) -> None:
    """Notes that a micro-batch will restore nothing."""
    for sequence, _, _ in flight.restored:
        sequence.num_restores -= 1
