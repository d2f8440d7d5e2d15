"""How many micro-batches in flight, and how much prefill in each: from measured times.

A cycle is the time between two tokens of one sequence. With R sequences cut into N
micro-batches of R/N rows, a stage that takes t(rows) and a slowest stage that takes t_max,

    cycle(N) = max(N * t_max(R/N), sum of t(R/N) + hops)

rises with N where the slowest stage is the limit (each micro-batch reads the weights again)
and falls with N where the way through the pipeline is. Randomly varying times cost a share
more while there is no slack (see `_loss`).

Stages that share a machine have more of its threads while nothing else is in flight: t of
cycle(1) is their team's. Where they fill the machine, more in flight are preferred, since cores
that wait for one could compute the others (see `PolicySettings`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
import numpy.typing as npt

from core.pipeline.batch_time import DEFAULT_PRIOR, Coefficients, size_of
from core.pipeline.row_cost import RowCost
from core.pipeline.speculation import Stakes
from core.pipeline.stage_times import COST_OF_TEAM, StageTimes

Array = npt.NDArray[np.float64]

# A cut is kept while another one promises no more than this.
_KEEP = 0.02
# Times that vary more do not follow the fitted line: that is no chance that slack would absorb.
_MOST_VARIATION = 0.15
# A loss to variation that is worth no further micro-batch.
_SMALL_LOSS = 0.03


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What the operator may want to change about the schedule."""

    prior: Coefficients = DEFAULT_PRIOR  # of every stage, before reports arrive
    hop_prior_s: float = 6e-4  # each link, the ways from and to the coordinator included
    # Until measured, fixed cost grows by this factor when stages compute at the same time
    # (on one machine they share the memory's bandwidth).
    contention_prior: float = 1.3
    # Two or more in flight must promise to be this much faster than one.
    overlap_gain: float = 0.02
    # Where stages fill the machine that they share, one must promise to be this much faster than
    # more: cores that wait while it is on its way could compute others.
    alone_gain: float = 0.15
    # The same as long as times beside others are guessed: a short try measures them.
    guessed_gain: float = 0.35
    # Longest that a micro-batch with decodes may take on the slowest stage because of prefill.
    decode_stall_s: float = 0.05
    # Fewest prompt tokens in a chunk, unless the prompt ends with it.
    min_chunk_rows: int = 16
    # Prefill shrinks in proportion when less than this share of the KV blocks is free.
    scarce_kv: float = 0.2


class InFlightPolicy:
    """Learns the times of a path and answers the scheduler's questions about numbers."""

    def __init__(
        self,
        times_S: Sequence[StageTimes],
        settings: PolicySettings,
        *,
        gains_alone: Sequence[float],
    ) -> None:
        """`times_S`: what is known of the replicas of the path; other paths may share them.
        `gains_alone`: see `ReplicaFacts`."""
        self._settings = settings
        self._gains_S = np.array(gains_alone)
        self._least_alone_S = np.where(self._gains_S > 1.0, COST_OF_TEAM / self._gains_S, 0.0)
        # Of one machine, since they gain alone; and with no cores beside them.
        self._fill_a_machine = min(gains_alone) > 1.0 and float((1.0 / self._gains_S).sum()) >= 1.0
        self._times_S = times_S
        self._hop_prior_s = self._hops_s = settings.hop_prior_s * (len(times_S) + 1)
        self._row_cost = RowCost()
        self._round_trips: deque[tuple[float, float, float]] = deque(maxlen=16)
        self._context = 64.0
        self._decode_targets: dict[int, int] = {}
        self._last_target = 1
        self.refresh()

    def begin_like(self, other: InFlightPolicy) -> None:
        """Takes over what another path of as many stages has learnt of its hops and rows."""
        self._row_cost = copy(other._row_cost)
        self._round_trips = copy(other._round_trips)
        self._context = other._context
        self._last_target = other._last_target
        self.refresh()

    # --- what was measured

    def observe_round_trip(self, seconds: float, *, rows: float, pairs: float) -> None:
        """Takes in the life of a micro-batch that was launched into an empty pipeline.

        None was ahead of it, so that it never queued: what was not computing was hops.
        """
        self._round_trips.append((seconds, rows, pairs))

    def observe_decode(self, seconds: float, *, rows: int) -> None:
        """Takes in the life of a micro-batch of decodes that was alone in the pipeline."""
        self._row_cost.observe(rows, seconds)

    def _estimate_hops(self) -> None:
        """With today's curves: early round trips were made before their times were known.

        A big micro-batch's computing varies by more than hops take: its remainder counts as
        far as it differs from the prior by more than that.
        """
        if not self._round_trips:
            return
        measured = any(times.num_alone for times in self._times_S)
        way_3 = np.array(self._way_alone_s if measured else self._way_s)
        trips_N3 = np.array(self._round_trips)
        computing_N = way_3[0] + trips_N3[:, 1:] @ way_3[1:]
        beyond_N = trips_N3[:, 0] - computing_N - self._hop_prior_s
        doubt_N = 2.0 * self._variation * computing_N
        trust_N = beyond_N**2 / (beyond_N**2 + doubt_N**2 + 1e-18)
        self._hops_s = max(self._hop_prior_s + float(np.median(trust_N * beyond_N)), 0.0)

    def set_context(self, mean_context: float) -> None:
        """The mean number of positions that a decoding row attends to; counts from the next
        `refresh` on."""
        self._context = mean_context

    def refresh(self) -> None:
        """Looks at what was measured since the last time."""
        self._decode_targets.clear()
        for times in self._times_S:
            times.fit()
        self._alone_S3 = np.array([times.alone for times in self._times_S])
        self._overlapped_S3 = np.array([times.overlapped for times in self._times_S])
        self._alone_bends_SB = np.stack([times.alone_bends_B for times in self._times_S])
        self._overlapped_bends_SB = np.stack([times.overlapped_bends_B for times in self._times_S])
        variation = float(np.mean([times.variation for times in self._times_S]))
        self._variation = min(variation, _MOST_VARIATION)
        typical = np.array([1.0, 64.0, 64.0 * self._context])
        slowest = int(np.argmax(self._overlapped_S3 @ typical))
        self._slowest_s = self._times_S[slowest].overlapped
        self._slowest_alone_s = self._times_S[slowest].alone
        self._way_s = _sum(self._overlapped_S3)
        self._way_alone_s = _sum(self._alone_S3)
        self._estimate_hops()

    @property
    def hops_s(self) -> float:
        """Seconds on the way that no stage computes."""
        return self._hops_s

    @property
    def mean_context(self) -> float:
        """The mean number of positions that a decoding row attends to."""
        return self._context

    # --- decodes

    def decode_target(self, num_sequences: int) -> int:
        """Micro-batches that `num_sequences` decoding sequences are best cut into."""
        target = self._decode_targets.get(num_sequences)
        if target is None:
            target = self._decode_targets[num_sequences] = self._best_cut(num_sequences)
            self._last_target = target
        return target

    def _best_cut(self, num_sequences: int) -> int:
        most = min(num_sequences, 3 * len(self._times_S) + 4)
        if most <= 1:
            return 1
        cycle_N, loss_N = self._cycles(num_sequences, most)
        best = 1 + int(np.argmin(cycle_N[1:]))
        if cycle_N[0] <= cycle_N[best] * (1.0 + self._least_gain()):
            return 1
        chosen = best
        # A little slack against varying times, where it is nearly free.
        for index in range(best, most):
            if cycle_N[index] > 1.08 * cycle_N[best]:
                break
            if loss_N[index] < _SMALL_LOSS:
                chosen = index
                break
        return 1 + self._keep_last(chosen, cycle_N, loss_N)

    def _least_gain(self) -> float:
        """What two or more in flight must promise over one, as a share."""
        settings = self._settings
        if not self._fill_a_machine:
            return settings.overlap_gain
        is_known = all(times.knows_overlap for times in self._times_S)
        return -(settings.alone_gain if is_known else settings.guessed_gain)

    def _keep_last(self, chosen: int, cycle_N: Array, loss_N: Array) -> int:
        """The last cut where it is about as good: every change unsettles the cohorts."""
        last = self._last_target - 1
        if not 0 < last < len(cycle_N):
            return chosen
        is_as_fast = cycle_N[last] <= (1.0 + _KEEP) * cycle_N[chosen]
        is_as_steady = loss_N[last] <= max(loss_N[chosen], _SMALL_LOSS)
        return last if is_as_fast and is_as_steady else chosen

    def _cycles(self, num_sequences: int, most: int) -> tuple[Array, Array]:
        """For N = 1 .. most: predicted seconds a cycle, and the share of it lost to variation."""
        n_N = np.arange(1, most + 1, dtype=np.float64)
        rows_N = np.ceil(num_sequences / n_N)
        features_3N = np.stack([np.ones(most), rows_N, rows_N * self._context])
        sizes_N = size_of(rows_N)
        seconds_SN = self._overlapped_S3 @ features_3N * self._overlapped_bends_SB[:, sizes_N]
        alone_S = self._alone_S3 @ features_3N[:, 0] * self._alone_bends_SB[:, sizes_N[0]]
        # So many rows, or pairs, may never have been alone: a team is no faster than its threads.
        seconds_SN[:, 0] = np.maximum(alone_S, seconds_SN[:, 0] * self._least_alone_S)
        way_N = seconds_SN.sum(axis=0) + self._hops_s
        work_N = n_N * seconds_SN.max(axis=0)
        loss_N = self._loss(work_N / way_N)
        loss_N[0] = 0.0
        return np.maximum(way_N, work_N) * (1.0 + loss_N), loss_N

    def _loss(self, slack_N: Array) -> Array:
        """Share of time lost to varying stage times, given work in flight over way through.

        Fitted to simulated closed lines of 2 to 64 equal stages: 8.5 % with as many
        micro-batches as stages and 3 %, 2 %, 1 % with 1.25, 1.5 and 2 times as many, at a
        standard deviation of 11.5 %. Stages that fill a machine lose nothing: while they wait, its
        cores do what coordinator, gateway and clients need anyway.
        """
        if self._fill_a_machine:
            return np.zeros_like(slack_N)
        return 0.75 * self._variation / (1.0 + 7.5 * np.maximum(slack_N - 1.0, 0.0))

    def stakes(self, num_sequences: int, *, rows: int) -> Stakes:
        """What a further row delays in a micro-batch with `rows` of `num_sequences` decodes.

        Where the slowest stage is the limit, every sequence waits for it; else the
        micro-batch's own, on the whole way.
        """
        target = self.decode_target(num_sequences)
        slowest, way = self._slowest_s, self._way_s
        if target == 1:
            slowest, way = self._slowest_alone_s, self._way_alone_s
        pairs = rows * self._context
        way_s = way.seconds(rows, pairs) + self._hops_s
        work_s = target * slowest.seconds(rows, pairs)
        if target > 1 and work_s >= way_s:
            row_s = slowest.row_s(self._context)
            return Stakes(tokens=num_sequences, seconds=work_s, row_s=row_s)
        learned_s = self._row_cost.row_s if target == 1 else None
        row_s = way.row_s(self._context) if learned_s is None else learned_s
        return Stakes(tokens=rows, seconds=max(way_s, work_s), row_s=row_s)

    # --- prefill

    def prefill_plan(
        self, *, backlog_rows: int, num_decodes: int, free_kv: float, max_rows: int
    ) -> PrefillPlan:
        """Sizes the chunks of a prefill backlog.

        Alone in the pipeline, P tokens in chunks of c take (P/c + k - 1)(fixed + c per_row) on
        k stages, least at c = sqrt(P fixed / ((k - 1) per_row)). With decodes, chunks are
        further bound by how long these may be stalled. Where stages share a machine, and take less
        time one after the other, each with all of it, than the slowest does beside the others,
        chunks go one by one, unless there are decodes that do not.
        """
        settings = self._settings
        times = self._slowest_s
        way_s = self._way_s.seconds(128.0, 128.0 * 64.0) + self._hops_s
        depth = way_s / max(times.seconds(128.0, 128.0 * 64.0), 1e-9)
        stages = max(depth - 1.0, 0.1)
        rows = sqrt(backlog_rows * times.fixed_s / (stages * max(times.per_row_s, 1e-9)))
        rows = min(max(rows, 4.0 * settings.min_chunk_rows), float(max_rows))
        longest_s = settings.decode_stall_s
        if num_decodes == 0:
            longest_s *= 4.0
        budget_s = min(times.seconds(rows, 0.0), longest_s)
        decodes_overlap = num_decodes > 0 and self.decode_target(num_decodes) > 1
        goes_alone = not decodes_overlap and self._is_faster_alone(
            self.chunk_rows(budget_s - times.fixed_s, 0)
        )
        return PrefillPlan(
            micro_batch_s=budget_s * min(free_kv / settings.scarce_kv, 1.0),
            in_flight=1 if goes_alone else max(ceil(1.25 * depth), 1),
        )

    def _is_faster_alone(self, rows: int) -> bool:
        """Whether chunks of so many rows had better not overlap: by how uneven the stages are, and
        by their threads, since times alone may be known of few rows only."""
        pairs = rows * max(0.5 * rows, self._context)
        seconds_S = self._overlapped_S3 @ np.array([1.0, rows, pairs])
        alone_s = COST_OF_TEAM * float((seconds_S / self._gains_S).sum())
        return alone_s < (1.0 - _KEEP) * float(seconds_S.max())

    def seconds(self, rows: float, pairs: float) -> float:
        """Predicted seconds of a micro-batch on the slowest stage."""
        return self._slowest_s.seconds(rows, pairs)

    def chunk_rows(self, budget_s: float, position: int) -> int:
        """Rows at `position` that fit `budget_s` on the slowest stage."""
        return self._slowest_s.rows_within(budget_s, position)


def _sum(times_S3: Array) -> Coefficients:
    """What stages take one after the other."""
    return Coefficients(*(float(sum_s) for sum_s in times_S3.sum(axis=0)))


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How a backlog of prompts is to be computed."""

    micro_batch_s: float  # time that a micro-batch with a chunk should take on the slowest stage
    in_flight: int  # micro-batches in flight until which a chunk may start another
