"""The decodes of a path: rows of sequences whose last token came back, and guesses beside them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from core.pipeline.flights import Sampler
from core.pipeline.sequences import Sequence

if TYPE_CHECKING:
    from core.pipeline.path import Path


class Decodes:
    """Those that came back first go first. How many micro-batches carry decodes at a time follows
    from the path's policy."""

    def __init__(self, path: Path) -> None:
        self.ready: deque[Sequence] = deque()
        self.num_flights = 0
        self._path = path
        self._shared = path.shared
        self._block_size = path.shared.facts.kv_block_size

    def take(self) -> list[Sampler]:
        """The next share of the decodes; empty when enough micro-batches carry decodes."""
        path, ready = self._path, self.ready
        while ready:
            num_decodes = path.num_decodes
            target = path.policy.decode_target(num_decodes)
            if self.num_flights >= target:
                break
            share = min(-(-num_decodes // target), path.max_rows, len(ready))
            chosen = self._make_room([ready.popleft() for _ in range(share)])
            if chosen:
                return self._guess(chosen)
        return []

    def _guess(self, chosen: list[Sequence]) -> list[Sampler]:
        """Adds guesses, unless other work waits for the same rows."""
        path, speculation = self._path, self._shared.speculation
        space = path.max_rows - len(chosen)
        stakes = None
        if space > 0 and path.num_backlog_rows == 0:
            stakes = path.policy.stakes(path.num_decodes, rows=len(chosen))
        if stakes is None or not speculation.pays(stakes):
            return [Sampler(sequence, []) for sequence in chosen]
        decodes = []
        spare_blocks = self._spare_blocks()
        for sequence in chosen:
            next_row = sequence.num_scheduled + 1
            room = sequence.capacity + spare_blocks * self._block_size - next_row
            draft = speculation.draft(sequence, stakes, most=min(space, room))
            missing = next_row + len(draft) - sequence.capacity
            if missing > 0:
                num_blocks = -(-missing // self._block_size)
                self._shared.mirror.grow(sequence, num_blocks)
                spare_blocks -= num_blocks
            space -= len(draft)
            decodes.append(Sampler(sequence, draft))
        return decodes

    def _spare_blocks(self) -> int:
        """Blocks that cost no sequence its place."""
        spare = [r.allocator.num_free - len(r.residents) for r in self._path.replicas]
        return max(min(spare), 0)

    def _make_room(self, chosen: list[Sequence]) -> list[Sequence]:
        """Gives a block to each of `chosen` that needs one, at the cost of the youngest."""
        wanting = [s for s in chosen if s.num_scheduled == s.capacity]
        if not wanting:
            return chosen
        for replica in self._path.replicas:
            while len(wanting) > replica.allocator.num_free:
                youngest = max(replica.residents, key=lambda sequence: sequence.order)
                self._shared.admission.preempt(youngest)
                wanting = [s for s in wanting if s is not youngest]
                chosen = [s for s in chosen if s is not youngest]
        for sequence in wanting:
            self._shared.mirror.grow(sequence, 1)
        return chosen
