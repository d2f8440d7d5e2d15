"""What a stage counts."""

from __future__ import annotations

from core.pipeline.batch import SequenceUpdates
from services.stage.timings import KvBlockCount


def test_a_shared_block_counts_once_until_its_last_holder_ends() -> None:
    count = KvBlockCount()
    count.note(SequenceUpdates(block_slots=(0, 0), block_ids=(7, 8)))
    count.note(SequenceUpdates(block_slots=(1, 1, 0), block_ids=(7, 3, 4)))
    assert count.num_used == 4
    count.note(SequenceUpdates(ended_slots=(0,)))
    assert count.num_used == 2
    count.note(SequenceUpdates(ended_slots=(1,), block_slots=(1,), block_ids=(7,)))
    assert count.num_used == 1
    count.note(SequenceUpdates(ended_slots=(1, 2)))
    assert count.num_used == 0
