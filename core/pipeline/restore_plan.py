"""What must be computed again when some replicas of a path lack what others have."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from itertools import pairwise

from core.pipeline.sequences import Piece


def plan_restore(held_S: List[int], landed: int) -> Iterator[Piece]:
    """Stage by stage, a sequence's first `held` positions are there, and all shall have `landed`.

    Yields pieces in the order to compute them. Of a piece, every stage lacks all positions, and
    the stage before it, which sends them, has them all, or will by then.
    """
    bounds = sorted({held for held in held_S if held < landed} | {landed})
    for first, end in pairwise(bounds):
        stage = 0
        while stage < len(held_S):
            first_stage = stage
            while stage < len(held_S) and held_S[stage] <= first:
                stage += 1
            if stage > first_stage:
                yield Piece(first_stage, stage, first, end)
            stage += 1
