"""How long one replica of a stage takes, alone in the pipeline and beside others."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from core.pipeline.batch_time import BatchTimeCurve, Coefficients

# Fewer observations under overlap say less than those alone and the prior of contention.
_ENOUGH = 32
# After so many micro-batches alone, what was measured under overlap is out of date.
_OUT_OF_DATE = 400
# Micro-batches after which the times are the replica's own, no longer the prior's.
_KNOWN = 8
# What threads take together of their cores' time, over what one would (measured with two: 1.03 to
# 1.09).
COST_OF_TEAM = 1.05


class StageTimes:
    """Two curves; until it was measured enough under overlap, its times alone, contended."""

    def __init__(self, prior: Coefficients, *, contention: float, gain_alone: float = 1.0) -> None:
        """Until times under overlap were measured they are those alone, times `contention` what is
        fixed, or all of it by what a stage that shares its machine gains alone (see
        `ReplicaFacts`)."""
        self._contention = contention
        self._gain_alone = gain_alone
        self._contended = prior._replace(fixed_s=prior.fixed_s * contention)
        self._alone = BatchTimeCurve(prior)
        self._overlapped = BatchTimeCurve(self._contended)
        self._alone_since = 0  # observations since the last under overlap
        self._num_own = 0
        self.fit()

    def for_sibling(self, *, gain_alone: float) -> StageTimes:
        """The same knowledge, for another replica of the stage to begin with."""
        times = deepcopy(self)
        times._gain_alone = gain_alone
        times._num_own = 0
        return times

    def become_like(self, sibling: StageTimes) -> None:
        """Forgets what was measured, and begins with a sibling's knowledge."""
        vars(self).update(vars(sibling.for_sibling(gain_alone=self._gain_alone)))

    @property
    def num_alone(self) -> int:
        """Observations without others."""
        return self._alone.num_observations

    @property
    def knows_overlap(self) -> bool:
        """Whether `overlapped` was measured, or else guessed from `alone`."""
        return self._overlapped.num_observations >= _ENOUGH

    @property
    def are_known(self) -> bool:
        """Whether the replica itself was measured."""
        return self._num_own >= _KNOWN

    @property
    def variation(self) -> float:
        """Standard deviation of times under overlap over predicted ones."""
        return self._overlapped.variation

    def observe(
        self,
        *,
        overlapped: bool,
        rows: Sequence[float],
        pairs: Sequence[float],
        seconds: Sequence[float],
    ) -> None:
        """Takes in micro-batches; `overlapped`: others were in flight. They count from the next
        `fit` on."""
        self._num_own += len(rows)
        if overlapped:
            self._overlapped.observe(rows, pairs, seconds)
            self._alone_since = 0
            return
        self._alone.observe(rows, pairs, seconds)
        self._alone_since += len(rows)
        if self._alone_since > _OUT_OF_DATE:
            # Overlap may pay by now: it will be tried again.
            self._overlapped = BatchTimeCurve(self._contended)
            self._alone_since = 0

    def fit(self) -> None:
        """Brings `alone` and `overlapped` up to date."""
        self._alone.fit()
        self._overlapped.fit()
        self.alone, self.alone_bends_B = self._alone.coefficients, self._alone.bends_B
        self.overlapped_bends_B = self._overlapped.bends_B
        if not self.knows_overlap and self.num_alone > 0:
            self._overlapped.coefficients = self._guess_overlapped()
            self.overlapped_bends_B = self.alone_bends_B
        self.overlapped = self._overlapped.coefficients

    def _guess_overlapped(self) -> Coefficients:
        fixed_s, per_row_s, per_pair_s = self.alone
        loss = max(self._gain_alone / COST_OF_TEAM, 1.0)
        return Coefficients(
            fixed_s * max(self._contention, loss), per_row_s * loss, per_pair_s * loss
        )
