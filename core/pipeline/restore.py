"""Gives replicas that are new to sequences what others of the path have: keys, values and log.

The replica before a run of new ones sends what it sent when it computed these positions, from
its log; the new ones compute them. Where the run begins with the first stage, it computes from
token ids. The last one of the run answers, without tokens.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from core.pipeline.actions import RunMicroBatch
from core.pipeline.flights import Flight, Restored
from core.pipeline.sequences import Piece, Sequence

if TYPE_CHECKING:
    from core.pipeline.path import Path

# Micro-batches that restore, in flight at a time: while one is computed the next one is there.
_MOST_FLIGHTS = 3


class Restoring:
    """Sequences of a path that cannot go on before something of them has been sent again.

    Pieces of several that lack the same stages share a micro-batch.
    """

    def __init__(self, path: Path) -> None:
        self.backlog: deque[Sequence] = deque()
        self.num_flights = 0
        self._path = path
        self._shared = path.shared

    @property
    def num_rows(self) -> int:
        """Rows that are not scheduled."""
        return sum(piece.end - piece.first for s in self.backlog for piece in s.pieces)

    def launch(self, now_s: float) -> RunMicroBatch | None:
        """The next micro-batch that restores, if there is work and not enough is in flight.

        Sequences of which nothing is left to restore go on at once: what they launch follows
        behind.
        """
        if not self.backlog or self.num_flights >= _MOST_FLIGHTS:
            return None
        first_stage, end_stage, *_ = self.backlog[0].pieces[0]
        sender = max(first_stage - 1, 0)
        replicas = self._path.replicas[sender:end_stage]
        action = RunMicroBatch(
            micro_batch_id=next(self._shared.ids),
            path=tuple(replica.id for replica in replicas),
            first_stage=sender,
            replays=first_stage > 0,
            slots_R=[],
            first_positions_R=[],
            num_rows_R=[],
            num_samples_R=[],
            token_ids_T=[],
            updates_P=[replica.take_updates() for replica in replicas],
        )
        restored = self._fill(action, first_stage, end_stage)
        rows, firsts = action.num_rows_R, action.first_positions_R
        flight = Flight(
            micro_batch_id=action.micro_batch_id,
            path=self._path,
            replicas=replicas,
            launched_s=now_s,
            rows=sum(rows),
            pairs=sum(n * first + n * n // 2 for n, first in zip(rows, firsts, strict=True)),
            overlapped=self._path.num_in_flight > 0 or self.num_flights > 0,
            replays=action.replays,
            restored=restored,
        )
        self.num_flights += 1
        self._shared.traffic.add(flight)
        return action

    def _fill(self, action: RunMicroBatch, first_stage: int, end_stage: int) -> list[Restored]:
        """Adds pieces of all that lack exactly these stages, as far as there is space."""
        path = self._path
        space = self._most_rows(first_stage, end_stage)
        restored = []
        for sequence in list(self.backlog):
            piece = sequence.pieces[0]
            if space == 0 or piece[:2] != (first_stage, end_stage):
                continue
            rows = min(space, piece.end - piece.first)
            space -= rows
            _add_rows(action, sequence, piece.first, rows)
            end = piece.first + rows
            restored.append(Restored(sequence, sequence.seats[first_stage:end_stage], end))
            sequence.num_restores += 1
            if end < piece.end:
                sequence.pieces[0] = piece._replace(first=end)
                continue
            sequence.pieces.popleft()
            if not sequence.pieces:
                self.backlog.remove(sequence)
                path.go_on(sequence)
        return restored

    def _most_rows(self, first_stage: int, end_stage: int) -> int:
        """Rows that hold the decodes of others up no longer than prompts may."""
        path = self._path
        plan = path.policy.prefill_plan(
            backlog_rows=self.num_rows,
            num_decodes=path.num_decodes,
            free_kv=1.0,
            max_rows=path.max_rows,
        )
        least = min(
            replica.times.overlapped.rows_within(plan.micro_batch_s, 64)
            for replica in path.replicas[first_stage:end_stage]
        )
        return min(max(least, 16), path.max_rows)


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


def _add_rows(action: RunMicroBatch, sequence: Sequence, first: int, rows: int) -> None:
    action.slots_R.append(sequence.slot)
    action.first_positions_R.append(first)
    action.num_rows_R.append(rows)
    action.num_samples_R.append(0)
    if action.first_stage == 0 and not action.replays:
        action.token_ids_T += sequence.token_ids[first : first + rows]


__all__ = ["Piece", "Restoring", "drop", "land"]
