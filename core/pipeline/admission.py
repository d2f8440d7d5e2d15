"""Who runs next, and on which path.

A path takes the head of the queue in when it has time for its prompt. Where several paths share
the work, it leaves the head to another one on which that would be served sooner.

A prompt of thousands of tokens takes seconds, for which one of ten would wait. So what is short may
pass what is long, whether that waits or is being computed; what is long is delayed by a bounded
share of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as List
from itertools import islice
from typing import TYPE_CHECKING

from core.pipeline.cut import Cut, Part
from core.pipeline.flights import Traffic
from core.pipeline.mirror import Mirror
from core.pipeline.sequences import Sequence, State
from core.pipeline.waiting import WaitingQueue

if TYPE_CHECKING:
    from core.pipeline.path import Path

# Tokens that a request is taken to generate: weighs how fast a path generates against how
# soon it has computed the prompt.
_TYPICAL_OUTPUT = 64
# A prompt lets later ones pass, each at most this share of what is left of it, until as much has
# passed as this share of itself.
_PASSING_SHARE = 0.5
# So many of the queue are looked at.
_MOST_PASSED = 32


class Admission:
    """The queue and the paths that take from it."""

    def __init__(
        self, mirror: Mirror, traffic: Traffic, *, tenant_weights: Mapping[str, float]
    ) -> None:
        self.queue = WaitingQueue(tenant_weights)
        self.stranded: set[Sequence] = set()  # without a path, though not without seats
        self.chosen: Cut | None = None  # what new sequences take
        self.lanes: List[Path] = ()  # of this cut
        self.lanes_of: dict[Cut, List[Path]] = {}  # of cuts that sequences have begun on
        # Since when there have been no lanes: for new sequences (None), of other cuts.
        self.down_since_s: dict[Cut | None, float] = {}
        self.num_preemptions = 0
        self.num_failovers = 0  # sequences that went on elsewhere, or over a new link
        self._mirror = mirror
        self._traffic = traffic

    def num_rows_for(self, path: Path) -> int:
        """Rows in the queue that the path may take, or more."""
        if not self.queue.num_rows or (path in self.lanes):
            return self.queue.num_rows
        return self.queue.num_rows if self._head_for(path) else 0

    def admit(
        self, path: Path, now_s: float, *, passing: Sequence | None = None
    ) -> Sequence | None:
        """Takes the head of the queue in, if there are a slot and blocks for it; or else, `passing`
        a prompt that is being computed, the first who may do so.

        Beyond the prompt's blocks every second running sequence keeps one to grow into, or
        the newcomer would be preempted at once.
        """
        passed: list[Sequence] = []
        if passing is None:
            sequence = self._head_for(path)
        else:
            sequence = self._who_passes(path, passing, passed)
        if sequence is None or path.has_newcomers:
            return None
        if self._traffic.carries(sequence):
            return None  # was preempted, and its last token has yet to return
        if not self._is_best(path, sequence):
            return None
        if not self._mirror.start(sequence, path.replicas, cut=path.cut, spare=_spare(path)):
            return None
        self.queue.remove(sequence)
        for other in passed:
            other.num_passed += len(sequence.token_ids)
        sequence.state = State.RUNNING
        path.take_in(sequence)
        if sequence.scheduled_s is None:
            sequence.scheduled_s = now_s
            sequence.num_cached = sequence.num_scheduled
        return sequence

    def move(self, sequence: Sequence, path: Path) -> bool:
        """Lets a stranded sequence run again; the queue has it, where there is no room."""
        if not self._mirror.move(sequence, path.replicas, cut=path.cut):
            self.preempt(sequence)
            return False
        self.stranded.remove(sequence)
        sequence.destination = None
        sequence.state = State.RUNNING
        path.take_in(sequence)
        self.num_failovers += 1
        return True

    def preempt(self, sequence: Sequence, *, publishes: bool = True) -> None:
        """Sends a sequence back to the queue, to be computed again, output so far included."""
        self.withdraw(sequence, publishes=publishes)
        sequence.state = State.WAITING
        sequence.num_scheduled = 0
        self.queue.put_back(sequence)
        self.num_preemptions += 1

    def withdraw(self, sequence: Sequence, *, publishes: bool = True) -> None:
        """Takes slot and blocks of a sequence back, or its place in the queue."""
        if sequence.state is State.WAITING:
            self.queue.remove(sequence)
            return
        if sequence.path is not None:
            sequence.path.leave(sequence)
        self.stranded.discard(sequence)
        sequence.destination = None
        self._mirror.end(sequence, publishes=publishes)

    def given_up(self, now_s: float, *, limit_s: float) -> list[Sequence]:
        """Those who have been without a path for too long, or without one that can hold them."""
        late = {cut for cut, since_s in self.down_since_s.items() if now_s - since_s > limit_s}
        begun = (*self.stranded, *self.queue) if late else ()
        lost = [s for s in begun if late.issuperset(self._cuts_for(s))]
        for sequence in self.queue:
            lanes = self._lanes_for(sequence)
            if not lanes or any(_fits(lane, sequence) for lane in lanes):
                break
            if sequence.unfit_since_s is None:
                sequence.unfit_since_s = now_s
            if now_s - sequence.unfit_since_s > limit_s:
                lost.append(sequence)
        return lost

    def _head_for(self, path: Path) -> Sequence | None:
        """The first that the path may take in."""
        for sequence in self.queue:
            if self._may_run(path, sequence):
                return sequence
        return None

    def _may_run(self, path: Path, sequence: Sequence) -> bool:
        return path in self._lanes_for(sequence) and _fits(path, sequence)

    def _who_passes(self, path: Path, prompt: Sequence, passed: list[Sequence]) -> Sequence | None:
        """The first in the queue that is short enough to pass a prompt and all who wait before it,
        who are added to `passed`."""
        passed.append(prompt)
        most_rows = _most_to_pass(prompt)
        for sequence in islice(self.queue, _MOST_PASSED):
            if most_rows < 1 or sequence.priority < prompt.priority:
                break
            if len(sequence.token_ids) <= most_rows and self._may_run(path, sequence):
                return sequence
            passed.append(sequence)
            most_rows = min(most_rows, _most_to_pass(sequence))
        return None

    def lanes_from(self, cut: Cut, *, probes: bool = False) -> List[Path]:
        """For sequences that began on a cut: those of the chosen one, where its weights are the
        same, or else, and where it has none, those of their own. Who `probes` stays on its own."""
        own = self.lanes_of.get(cut, ())
        return (self.lanes or own) if self._may_leave(cut, probes=probes) else own

    def _may_leave(self, cut: Cut, *, probes: bool) -> bool:
        """Whether who began on a cut may take the chosen one."""
        return not probes and self.chosen is not None and cut.weights == self.chosen.weights

    def parts_for(self, sequence: Sequence) -> set[Part]:
        """What a sequence that has begun may go on on."""
        assert sequence.cut is not None
        parts = set(sequence.cut.parts)
        if self.chosen is not None and self._may_leave(sequence.cut, probes=sequence.probes):
            parts.update(self.chosen.parts)
        return parts

    def _lanes_for(self, sequence: Sequence) -> List[Path]:
        if sequence.cut is None:
            return self.lanes
        return self.lanes_from(sequence.cut, probes=sequence.probes)

    def _cuts_for(self, sequence: Sequence) -> set[Cut | None]:
        """The cuts that it could take, None for the chosen one."""
        if sequence.cut is None:
            return {None}
        may_leave = self._may_leave(sequence.cut, probes=sequence.probes)
        return {None, sequence.cut} if may_leave else {sequence.cut}

    def _is_best(self, path: Path, sequence: Sequence) -> bool:
        lanes = self._lanes_for(sequence)
        if len(lanes) == 1:
            return True
        open_lanes = [one for one in lanes if _fits(one, sequence) and _has_room(one, sequence)]
        if not open_lanes:
            return True
        return path is min(open_lanes, key=lambda lane: self._cost_s(lane, sequence))

    def _cost_s(self, lane: Path, sequence: Sequence) -> tuple[float, float]:
        """How long the request would take there; among equals, the least busy replicas count."""
        cycles_s = [
            replica.cycle_s(len(replica.residents) + 1, mean_context=lane.policy.mean_context)
            for replica in lane.replicas
        ]
        found = self._mirror.num_findable(sequence, lane.replicas, lane.cut)
        rows = lane.num_own_rows + len(sequence.token_ids) - found
        row_s = lane.policy.seconds(rows, 0.0)
        return _TYPICAL_OUTPUT * max(cycles_s) + row_s, sum(cycles_s)


def _most_to_pass(sequence: Sequence) -> int:
    """Tokens of a prompt that may be computed before the rest of this one."""
    left = int(_PASSING_SHARE * sequence.num_prompt_tokens) - sequence.num_passed
    return min(int(_PASSING_SHARE * sequence.num_unscheduled), left)


def _spare(path: Path) -> int:
    return max(len(replica.residents) for replica in path.replicas) // 2


def _fits(lane: Path, sequence: Sequence) -> bool:
    """Whether it could end there."""
    return sequence.most_blocks <= lane.num_kv_blocks


def _has_room(lane: Path, sequence: Sequence) -> bool:
    """Whether it could start there though it found nothing."""
    block_size = lane.shared.facts.kv_block_size
    wanted = -(-len(sequence.token_ids) // block_size) + _spare(lane)
    return all(replica.allocator.num_free >= wanted for replica in lane.replicas)
