"""Prompts of a path: which rows of them the next micro-batch computes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from core.pipeline.flights import Chunk, Promise, Sampler
from core.pipeline.sequences import Sequence

if TYPE_CHECKING:
    from core.pipeline.path import Path


class Prefill:
    """Takes sequences in from the queue and cuts prompts into chunks, one prompt after another, but
    that long ones let short ones pass."""

    def __init__(self, path: Path, *, min_chunk_rows: int) -> None:
        # Admitted, and not wholly scheduled. The first is gone on with; those behind it have let it
        # pass, or came from paths that were lost.
        self.partial: deque[Sequence] = deque()
        self.promises: list[Promise] = []  # of the chunks taken last
        self._path = path
        self._shared = path.shared
        self._min_chunk_rows = min_chunk_rows

    @property
    def num_rows(self) -> int:
        """Of the prompts taken in, rows that are not scheduled."""
        return sum(sequence.num_unscheduled for sequence in self.partial)

    def take(self, decodes: list[Sampler], now_s: float) -> list[Chunk]:
        """Prompt rows for the next micro-batch, as many as time and space allow."""
        path = self._path
        backlog_rows = path.num_backlog_rows
        if backlog_rows == 0:
            return []
        rows = sum(decode.num_samples for decode in decodes)
        space = path.max_rows - rows
        if space == 0:
            return []
        policy = path.policy
        plan = policy.prefill_plan(
            backlog_rows=backlog_rows,
            num_decodes=path.num_decodes,
            free_kv=path.free_share,
            max_rows=path.max_rows,
        )
        if not decodes and path.num_in_flight >= plan.in_flight:
            return []
        budget_s = plan.micro_batch_s - policy.seconds(rows, num_pairs(decodes))
        return self._fill(budget_s, space, now_s)

    def _fill(self, budget_s: float, space: int, now_s: float) -> list[Chunk]:
        """At least one chunk of the least size, so that decodes cannot starve prefill."""
        policy, least = self._path.policy, self._min_chunk_rows
        chunks: list[Chunk] = []
        self.promises = []
        while space > 0:
            if chunks and policy.chunk_rows(budget_s, 0) < least:
                break
            sequence = self._next(now_s)
            if sequence is None:
                break
            rows = max(policy.chunk_rows(budget_s, sequence.num_scheduled), least)
            if rows + least > sequence.num_unscheduled:
                rows = sequence.num_unscheduled
            rows = min(rows, space)
            self._add(chunks, sequence, rows)
            pairs = rows * (sequence.num_scheduled + 0.5 * rows)
            budget_s -= policy.seconds(rows, pairs) - policy.seconds(0, 0)
            space -= rows
            if rows < sequence.num_unscheduled:
                break
            self.partial.popleft()
        return chunks

    def _next(self, now_s: float) -> Sequence | None:
        """The prompt to go on with; it stays in `partial`."""
        passing = self.partial[0] if self.partial else None
        sequence = self._shared.admission.admit(self._path, now_s, passing=passing)
        if sequence is not None:
            self.partial.appendleft(sequence)
        return self.partial[0] if self.partial else None

    def _add(self, chunks: list[Chunk], sequence: Sequence, rows: int) -> None:
        chunks.append(Chunk(sequence, rows))
        promise = self._shared.mirror.publish(sequence, num_positions=sequence.num_scheduled + rows)
        if promise is not None:
            self.promises.append(promise)


def num_pairs(decodes: list[Sampler]) -> int:
    """Rows looking at positions."""
    pairs = 0
    for sequence, draft in decodes:
        pairs += sequence.num_scheduled
        if draft:
            guesses = len(draft)
            pairs += guesses * sequence.num_scheduled + guesses * (guesses + 1) // 2
    return pairs
