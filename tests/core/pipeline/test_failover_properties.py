"""Random histories with faults at every step: no request is lost, and no answer changes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from core.pipeline.cut import Cut, Part
from core.pipeline.events import CutChosen, ReplicaDraining, Tick
from tests.support.pipeline_machine import PipelineMachine, Repetitive

MOST_REPLICAS = 7
# Of four layers; the first one is that of the machines' stages.
CUTS = tuple(
    Cut(tuple(Part(first, ("",) * (end - first)) for first, end in pairwise(bounds)))
    for bounds in ((0, 2, 3, 4), (0, 2, 4), (0, 1, 3, 4), (0, 4))
)


class FaultyMachine(PipelineMachine):
    """Replicas and links die, stop and come back; news of it travels as slowly as all else."""

    num_replicas_S = (1, 2, 2)
    micro_batch_timeout_s = 3.0

    @rule(stage=st.integers(0, 2), is_spare=st.booleans(), num_kv_blocks=st.sampled_from([12, 20]))
    def open(self, stage: int, is_spare: bool, num_kv_blocks: int) -> None:
        if len(self.replicas) < MOST_REPLICAS:
            self.pipeline.open(stage, is_spare=is_spare, num_kv_blocks=num_kv_blocks)

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), tells=st.booleans())
    def kill(self, data: st.DataObject, tells: bool) -> None:
        replica = data.draw(st.sampled_from(self.replicas))
        self.pipeline.kill(replica.id, tells=tells)

    @precondition(lambda self: self.pipeline.exact.links)
    @rule(data=st.data(), tells=st.booleans())
    def cut(self, data: st.DataObject, tells: bool) -> None:
        link = data.draw(st.sampled_from(sorted(self.pipeline.exact.links)))
        self.pipeline.cut(*link, tells=tells)

    @rule(data=st.data())
    def mend(self, data: st.DataObject) -> None:
        if broken := self.pipeline.broken_links():
            self.pipeline.connect(*data.draw(st.sampled_from(broken)))

    @rule()
    def tell(self) -> None:
        self.pipeline.tell()

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), moves=st.booleans())
    def drain(self, data: st.DataObject, moves: bool) -> None:
        replica = data.draw(st.sampled_from(self.replicas))
        self.pipeline.handle(ReplicaDraining(replica_id=replica.id, moves=moves))

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """It hangs, and is found out, sooner or later."""
        data.draw(st.sampled_from(self.replicas)).is_stopped = True

    def _find_out_who_hangs(self) -> None:
        """Time passes until nobody is in the way any more."""
        pipeline = self.pipeline
        while pipeline.open_requests and pipeline.scheduler.num_in_flight:
            pipeline.finish()
            for replica in pipeline.replicas:
                replica.report()
            pipeline.finish()
            pipeline.now_s += 0.9
            pipeline.handle(Tick())
        for replica in pipeline.replicas:
            replica.is_stopped = False

    def something_is_in_flight_while_requests_are_open(self) -> None:
        """Not so while those who are to go on wait for replicas."""

    def teardown(self) -> None:
        """When all faults are over, every request is answered."""
        pipeline = self.pipeline
        pipeline.tell()
        for stage in range(pipeline.num_stages):
            pipeline.open(stage, num_kv_blocks=20)
        for link in pipeline.broken_links():
            pipeline.connect(*link)
        self._find_out_who_hangs()
        super().teardown()


class MovingMachine(FaultyMachine):
    """The layers move between stages, too."""

    num_layers_S = (2, 1, 1)

    @rule(
        cut=st.sampled_from(CUTS), number=st.integers(0, 2), num_kv_blocks=st.sampled_from([12, 20])
    )
    def open_part(self, cut: Cut, number: int, num_kv_blocks: int) -> None:
        if len(self.replicas) < MOST_REPLICAS:
            part = cut.parts[number % len(cut.parts)]
            self.pipeline.open_part(part, num_kv_blocks=num_kv_blocks)

    @rule(cut=st.sampled_from(CUTS))
    def choose(self, cut: Cut) -> None:
        """Whether there are replicas of its parts or not."""
        self.pipeline.handle(CutChosen(cut=cut))

    @rule(cut=st.sampled_from(CUTS), moves=st.booleans())
    def move_layers(self, cut: Cut, moves: bool) -> None:
        """The whole operation at once."""
        pipeline = self.pipeline
        if len(self.replicas) >= MOST_REPLICAS:
            return
        held = {replica.part for replica in self.replicas}
        for part in set(cut.parts) - held:
            pipeline.open_part(part, num_kv_blocks=20)
        pipeline.handle(CutChosen(cut=cut))
        for replica in self.replicas:
            if replica.part not in cut.parts:
                pipeline.handle(ReplicaDraining(replica_id=replica.id, moves=moves))

    def teardown(self) -> None:
        self.choose(CUTS[0])
        super().teardown()


class RepetitiveFaultyMachine(Repetitive, FaultyMachine):
    """Verifies guesses."""


_SETTINGS = settings(max_examples=150, stateful_step_count=60, deadline=None)
FaultyMachine.TestCase.settings = _SETTINGS
RepetitiveFaultyMachine.TestCase.settings = _SETTINGS
MovingMachine.TestCase.settings = _SETTINGS
TestFaultyPipeline = FaultyMachine.TestCase
TestRepetitiveFaultyPipeline = RepetitiveFaultyMachine.TestCase
TestMovingPipeline = MovingMachine.TestCase
