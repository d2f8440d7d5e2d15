"""Which micro-batches may have the machine to themselves."""

from __future__ import annotations

from core.pipeline.actions import RunMicroBatch
from tests.support.exact_pipeline import ExactPipeline

PROMPT = list(range(100, 122))


def launched(pipeline: ExactPipeline) -> list[RunMicroBatch]:
    """Micro-batches of the latest turn."""
    return [action for action in pipeline.actions if isinstance(action, RunMicroBatch)]


def test_the_only_micro_batch_in_flight_is_alone() -> None:
    pipeline = ExactPipeline(1, 1)
    pipeline.ask(PROMPT, max_tokens=5)
    pipeline.finish()
    assert all(batch.is_alone for batch in pipeline.batches)


def test_one_that_is_launched_while_another_is_in_flight_is_not_alone() -> None:
    pipeline = ExactPipeline(1, 1)
    for _ in range(2):
        pipeline.ask(PROMPT, max_tokens=5)
    assert [batch.is_alone for batch in pipeline.batches] == [True, False]


def test_what_restores_one_replica_is_alone_though_decodes_wait_behind_it() -> None:
    pipeline = ExactPipeline(1, 2)
    pipeline.ask(PROMPT, max_tokens=20)
    while len(pipeline.asked[0].output) < 3:
        pipeline.turn()
    pipeline.kill(pipeline.batches[-1].path[1])
    restores, decodes = launched(pipeline)
    assert (restores.replays, restores.is_alone) == (True, True)
    assert (decodes.replays, decodes.is_alone) == (False, False)


def test_what_restores_is_not_alone_beside_what_passes_other_replicas() -> None:
    pipeline = ExactPipeline(3, 3)
    for _ in range(6):
        pipeline.ask(PROMPT, max_tokens=20)
    while any(len(asked.output) < 3 for asked in pipeline.asked.values()):
        pipeline.turn()
    pipeline.kill(pipeline.batches[-1].path[1])
    batches = launched(pipeline)
    assert any(batch.replays for batch in batches)
    assert not any(batch.is_alone for batch in batches)
