"""A stage's mirror of the sequences that the coordinator owns.

Everything here came over the network, so all of it is checked before anything changes.

Letters: S slots, B blocks of a sequence, R runs, T rows, N new blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core.errors import ProtocolViolation
from core.kernels.arithmetic import LANES
from core.pipeline.batch import MicroBatch, SequenceUpdates

BLOCK_SIZE = LANES  # positions in a KV block
_NOTHING = SequenceUpdates()


class _Runs(NamedTuple):
    """Runs that could be right in some state."""

    slots_R: npt.NDArray[np.int64]
    first_R: npt.NDArray[np.int64]
    num_rows_R: npt.NDArray[np.int64]

    @property
    def end_R(self) -> npt.NDArray[np.int64]:
        return self.first_R + self.num_rows_R

    @property
    def num_rows(self) -> int:
        return int(self.num_rows_R.sum())


class SequenceTable:
    """Which slots are live, how many positions each has computed, and its KV blocks."""

    def __init__(self, *, num_slots: int, num_kv_blocks: int, context_length: int) -> None:
        self.num_slots = num_slots
        self.num_kv_blocks = num_kv_blocks
        self.context_length = context_length
        max_blocks = -(-context_length // BLOCK_SIZE)
        self.block_tables_SB = np.zeros((num_slots, max_blocks), np.int32)
        self._is_live_S = np.zeros(num_slots, np.bool_)
        self._lengths_S = np.zeros(num_slots, np.int64)
        # Where the next run may begin at the earliest: later positions rest on guesses.
        self._certain_S = np.zeros(num_slots, np.int64)
        self._num_blocks_S = np.zeros(num_slots, np.int64)

    def apply(self, updates: SequenceUpdates) -> None:
        """Ends, starts, blocks, rewinds.

        Raises ProtocolViolation, changing nothing, if one does not fit.
        """
        if updates == _NOTHING:
            return
        ended = self._slots(updates.ended_slots, "ended_slots")
        started = self._slots([start.slot for start in updates.starts], "starts")
        is_live_S = self._is_live_S.copy()
        _require(bool(is_live_S[ended].all()), "a sequence that ends is not live", ended)
        is_live_S[ended] = False
        _require(not is_live_S[started].any(), "a sequence starts in a live slot", started)
        is_live_S[started] = True
        num_blocks_S = self._num_blocks_S.copy()
        num_blocks_S[ended] = 0
        positions = self._place_blocks(updates, is_live_S, num_blocks_S)
        cached = self._cached_positions(updates, num_blocks_S[started])
        rewound = self._rewound(updates, is_live_S)
        self._is_live_S = is_live_S
        self._num_blocks_S = num_blocks_S
        self._lengths_S[started] = cached
        self._certain_S[started] = cached
        if len(positions):
            self.block_tables_SB[updates.block_slots, positions] = updates.block_ids
        for known_S in (self._lengths_S, self._certain_S):
            known_S[rewound] = np.minimum(known_S[rewound], updates.rewind_positions)

    def _slots(self, slots: Sequence[int], name: str) -> npt.NDArray[np.int64]:
        """Slots as an array; they must exist and be distinct."""
        array = np.array(slots, np.int64)
        in_range = (array >= 0) & (array < self.num_slots)
        _require(bool(in_range.all()), f"{name}: slots must be below {self.num_slots}", array)
        _require(len(np.unique(array)) == len(array), f"{name}: a slot occurs twice", array)
        return array

    def _cached_positions(
        self, updates: SequenceUpdates, num_blocks: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """How many positions of each starting sequence its blocks hold already."""
        cached = np.array([start.num_cached_positions for start in updates.starts], np.int64)
        are_whole = (cached >= 0) & (cached % BLOCK_SIZE == 0)
        _require(bool(are_whole.all()), "cached positions are not whole blocks", cached)
        are_covered = cached <= num_blocks * BLOCK_SIZE
        _require(bool(are_covered.all()), "cached positions have no KV block", cached)
        return cached

    def _rewound(
        self, updates: SequenceUpdates, is_live_S: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Slots that forget what they computed from a position on."""
        slots = self._slots(updates.rewind_slots, "rewind_slots")
        positions = np.array(updates.rewind_positions, np.int64)
        _require(
            len(slots) == len(positions),
            "rewind_slots and rewind_positions differ in length",
            positions,
        )
        _require(bool((positions >= 0).all()), "a rewind to before the first position", positions)
        _require(bool(is_live_S[slots].all()), "a sequence that is rewound is not live", slots)
        return slots

    def _place_blocks(
        self,
        updates: SequenceUpdates,
        is_live_S: npt.NDArray[np.bool_],
        num_blocks_S: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Entry of each new block in its sequence's table; counts them in `num_blocks_S`."""
        slots_N = np.array(updates.block_slots, np.int64)
        ids_N = np.array(updates.block_ids, np.int64)
        _require(len(slots_N) == len(ids_N), "block_slots and block_ids differ in length", ids_N)
        in_range = (slots_N >= 0) & (slots_N < self.num_slots)
        _require(bool(in_range.all()), f"block_slots must be below {self.num_slots}", slots_N)
        _require(bool(is_live_S[slots_N].all()), "a block for a slot that is not live", slots_N)
        known = (ids_N >= 0) & (ids_N < self.num_kv_blocks)
        _require(bool(known.all()), f"block_ids must be below {self.num_kv_blocks}", ids_N)
        order = np.argsort(slots_N, kind="stable")
        sorted_slots = slots_N[order]
        first_of_slot = np.searchsorted(sorted_slots, sorted_slots)
        positions_N = np.empty(len(slots_N), np.int64)
        positions_N[order] = num_blocks_S[sorted_slots] + np.arange(len(slots_N)) - first_of_slot
        max_blocks = self.block_tables_SB.shape[1]
        fits = positions_N < max_blocks
        _require(bool(fits.all()), f"more than {max_blocks} blocks for a sequence", slots_N)
        np.add.at(num_blocks_S, slots_N, 1)
        return positions_N

    def places(
        self, slots_T: npt.NDArray[np.int32], positions_T: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Where in the cache each row's position is, counted over all blocks."""
        blocks_T = self.block_tables_SB[slots_T, positions_T // BLOCK_SIZE].astype(np.int64)
        return blocks_T * BLOCK_SIZE + positions_T % BLOCK_SIZE

    def check(self, batch: MicroBatch, *, max_rows: int) -> int:
        """Checks that every run continues its sequence and has blocks; returns the rows."""
        runs = self._check_runs(batch, max_rows=max_rows)
        self._check_samples(batch.num_samples_R, runs.num_rows_R)
        self._check_firsts(runs.slots_R, runs.first_R)
        in_context = bool((runs.end_R <= self.context_length).all())
        _require(in_context, f"the context is {self.context_length} positions", runs.end_R)
        covered = bool((runs.end_R <= self._num_blocks_S[runs.slots_R] * BLOCK_SIZE).all())
        _require(covered, "a run's positions have no KV block", runs.slots_R)
        return runs.num_rows

    def check_replay(self, batch: MicroBatch, *, max_rows: int) -> int:
        """Checks that every run has been computed; returns the rows."""
        runs = self._check_runs(batch, max_rows=max_rows)
        known = (runs.first_R >= 0) & (runs.end_R <= self._lengths_S[runs.slots_R])
        _require(bool(known.all()), "positions to replay were not computed", runs.first_R)
        return runs.num_rows

    def _check_runs(self, batch: MicroBatch, *, max_rows: int) -> _Runs:
        """Checks what holds for runs of any kind."""
        runs = (batch.slots_R, batch.first_positions_R, batch.num_rows_R, batch.num_samples_R)
        shapes = {np.shape(run) for run in runs}
        _require(len(shapes) == 1 and len(shapes.pop()) == 1, "runs differ in number", batch.id)
        _require(all(run.dtype.kind in "iub" for run in runs), "runs are not integers", batch.id)
        slots_R = self._slots(batch.slots_R, "slots_R")  # type: ignore[arg-type]
        first_R, num_rows_R = (run.astype(np.int64) for run in runs[1:3])
        _require(len(slots_R) > 0, "a micro-batch without runs", batch.id)
        _require(bool((num_rows_R >= 1).all()), "a run without rows", num_rows_R)
        num_rows = int(num_rows_R.sum())
        _require(num_rows <= max_rows, f"a micro-batch has at most {max_rows} rows", num_rows)
        _require(bool(self._is_live_S[slots_R].all()), "a run's slot is not live", slots_R)
        return _Runs(slots_R, first_R, num_rows_R)

    def _check_samples(
        self, num_samples_R: npt.NDArray[np.int32], num_rows_R: npt.NDArray[np.int64]
    ) -> None:
        fits = (num_samples_R >= 0) & (num_samples_R <= num_rows_R)
        _require(bool(fits.all()), "a run samples as many rows as it has, or fewer", num_samples_R)

    def _check_firsts(self, slots_R: npt.NDArray[np.int64], first_R: npt.NDArray[np.int64]) -> None:
        """Runs go on where their sequences end, or go back behind a guess that was right."""
        least_R, most_R = self._certain_S[slots_R], self._lengths_S[slots_R]
        _require(
            bool(((least_R <= first_R) & (first_R <= most_R)).all()),
            f"runs must go on at positions {most_R[:16].tolist()}, or {least_R[:16].tolist()} "
            "and later",
            first_R,
        )

    def advance(self, batch: MicroBatch) -> None:
        """Notes that the batch's positions have been computed."""
        end_R = batch.first_positions_R + batch.num_rows_R
        self._lengths_S[batch.slots_R] = end_R
        self._certain_S[batch.slots_R] = end_R - np.maximum(batch.num_samples_R - 1, 0)


def _require(holds: bool, expectation: str, seen: Any) -> None:
    if not holds:
        shown = seen[:16].tolist() if isinstance(seen, np.ndarray) else seen
        raise ProtocolViolation(f"{expectation}; seen: {shown}")
