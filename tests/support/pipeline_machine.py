"""Random histories of a pipeline of exact replicas: the rules that all of them share."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import DeadlineExceeded, Exhausted, Unavailable
from core.pipeline.actions import FinishReason
from core.pipeline.events import RequestCancelled, Tick
from core.pipeline.sequences import State
from core.pipeline.settings import SchedulerSettings
from tests.support.exact_pipeline import ExactPipeline
from tests.support.exact_replicas import ExactReplica, NextToken
from tests.support.fake_engine import next_token, repeated_token

NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_ROWS = 5, 12, 4, 16
MAX_WAITING = 6
PENALTIES = {"repetition_penalty": 1.5}


class PipelineMachine(RuleBasedStateMachine):
    """Drives a scheduler and its replicas in every order that the streams allow."""

    next_token: ClassVar[NextToken] = staticmethod(next_token)
    num_prompt_ids = 100
    num_replicas_S: tuple[int, ...] = (1, 1, 1)
    num_layers_S: tuple[int, ...] = (1, 1, 1)
    micro_batch_timeout_s = 1e9

    def __init__(self) -> None:
        super().__init__()
        self.pipeline = ExactPipeline(
            *self.num_replicas_S,
            num_layers_S=self.num_layers_S,
            num_kv_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_rows=MAX_ROWS,
            num_slots=NUM_SLOTS,
            context_length=64,
            settings=SchedulerSettings(
                max_waiting=MAX_WAITING,
                micro_batch_timeout_s=self.micro_batch_timeout_s,
                lost_limit_s=1e9,
            ),
            next_token=self.next_token,
        )

    @property
    def replicas(self) -> list[ExactReplica]:
        return self.pipeline.replicas

    # --- requests

    @rule(
        num_shared=st.integers(0, 30),
        num_own=st.integers(1, 10),
        topic=st.integers(0, 1),
        max_tokens=st.integers(1, 12),
        timeout_s=st.one_of(st.none(), st.floats(0.0, 5.0)),
        salt=st.sampled_from(["", "", "", "tenant"]),
        penalties=st.sampled_from([{}, {}, PENALTIES]),
    )
    def arrive(
        self,
        num_shared: int,
        num_own: int,
        topic: int,
        max_tokens: int,
        timeout_s: float | None,
        salt: str,
        penalties: dict[str, Any],
    ) -> None:
        shared = [(7 * topic + index) % self.num_prompt_ids for index in range(num_shared)]
        first = 7 * len(self.pipeline.asked)
        own = [(first + index) % self.num_prompt_ids for index in range(num_own)]
        deadline_s = None if timeout_s is None else self.pipeline.now_s + timeout_s
        self.pipeline.ask(
            shared + own,
            max_tokens=max_tokens,
            deadline_s=deadline_s,
            cache_salt=salt,
            **penalties,
        )

    @precondition(lambda self: any(asked.output for asked in self.pipeline.asked.values()))
    @rule(data=st.data(), num_own=st.integers(1, 6))
    def follow_up(self, data: st.DataObject, num_own: int) -> None:
        """A conversation goes on: prompt and output so far begin the next prompt."""
        talked = [asked for asked in self.pipeline.asked.values() if asked.output]
        asked = data.draw(st.sampled_from(talked))
        self.pipeline.ask((asked.prompt + asked.output)[:30] + [3] * num_own, max_tokens=3)

    @precondition(lambda self: self.pipeline.open_requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.pipeline.open_requests))
        self.pipeline.handle(RequestCancelled(request_id=request_id))
        assert self.pipeline.asked[request_id].ends == [FinishReason.CANCELLED]

    @rule(seconds=st.floats(0.0, 1.0))
    def wait(self, seconds: float) -> None:
        self.pipeline.now_s += seconds
        self.pipeline.handle(Tick())

    # --- replicas

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), count=st.integers(1, 4))
    def compute(self, data: st.DataObject, count: int) -> None:
        """A replica performs some of its orders, as far as their activations are there."""
        replica = data.draw(st.sampled_from(self.replicas))
        for _ in range(count):
            replica.receive()
            replica.step()

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), count=st.integers(1, 3))
    def receive(self, data: st.DataObject, count: int) -> None:
        replica = data.draw(st.sampled_from(self.replicas))
        for _ in range(count):
            replica.receive()

    @precondition(lambda self: any(replica.outbox for replica in self.replicas))
    @rule(data=st.data(), count=st.integers(1, 3))
    def deliver(self, data: st.DataObject, count: int) -> None:
        speaking = [replica for replica in self.replicas if replica.outbox]
        self.pipeline.deliver(data.draw(st.sampled_from(speaking)), count=count)

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.replicas)).report()

    @rule(count=st.integers(1, 5))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.pipeline.turn()

    # --- what must always hold

    @invariant()
    def blocks_are_held_by_those_who_have_seats(self) -> None:
        scheduler = self.pipeline.scheduler
        assert scheduler._pipeline is not None
        sequences = scheduler._sequences.values()
        for replica in scheduler._pipeline.topology.replicas.values():
            seats = [seat for s in sequences for seat in s.seats if seat.replica is replica]
            held = Counter(block for seat in seats for block in seat.block_ids)
            allocator = replica.allocator
            assert len(held) == allocator.num_used
            assert [held[block] for block in range(allocator.num_blocks)] == allocator._num_holders
            assert len(replica.residents) == len(seats)
        slots = [sequence.slot for sequence in sequences if sequence.slot >= 0]
        assert len(set(slots)) == len(slots)
        assert all(slot < NUM_SLOTS for slot in slots)

    @invariant()
    def everybody_is_somewhere(self) -> None:
        scheduler = self.pipeline.scheduler
        assert scheduler._pipeline is not None
        admission = scheduler._pipeline.admission
        for sequence in scheduler._sequences.values():
            assert (sequence in admission.queue) == (sequence.state is State.WAITING)
            assert (sequence in admission.stranded) == (sequence.state is State.STRANDED)
            assert (sequence.path is not None) == (sequence.state is State.RUNNING)
            if sequence.path is not None:
                assert sequence in sequence.path.running
                assert tuple(seat.replica for seat in sequence.seats) == sequence.path.replicas
        assert len(scheduler._sequences) == len(self.pipeline.open_requests)
        assert admission.queue.num_rows == sum(len(s.token_ids) for s in admission.queue)
        orders = [sequence.order for sequence in admission.queue]
        assert orders == sorted(orders)

    @invariant()
    def something_is_in_flight_while_requests_are_open(self) -> None:
        if self.pipeline.open_requests and self.pipeline.scheduler.is_ready:
            assert self.pipeline.scheduler.num_in_flight > 0

    def teardown(self) -> None:
        """Without further events from outside, everything ends right, in bounded time.

        But one: stages whose replica the scheduler has given up, since nothing came back for two
        seconds while its time was known, get another one.
        """
        self.pipeline.tell()
        for stage in range(self.pipeline.num_stages):
            if not self.pipeline.of_stage(stage):
                self.pipeline.open(stage)
        self.pipeline.finish()
        assert not self.pipeline.open_requests
        scheduler = self.pipeline.scheduler
        assert scheduler.num_in_flight == 0
        for replica in self.replicas:
            assert scheduler.kv_blocks_used(replica.id) == 0
            assert replica.engine.sequences == {}
        for asked, was_answered in zip(
            self.pipeline.asked.values(), self.pipeline.answers(), strict=True
        ):
            assert was_answered or self.may_end(asked.ends[0])

    def may_end(self, end: object) -> bool:
        """Whether a request may end so, and not with its answer."""
        if isinstance(end, Unavailable):
            return False
        return end is FinishReason.CANCELLED or isinstance(end, DeadlineExceeded | Exhausted)


class Repetitive:
    """Of a machine: its tokens can often be guessed, and the guesses are often wrong."""

    next_token: ClassVar[NextToken] = staticmethod(repeated_token)
    num_prompt_ids = 4
