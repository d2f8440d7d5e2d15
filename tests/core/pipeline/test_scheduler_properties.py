"""Random histories of one pipeline: whatever happens, every request ends once, and right.

The stages are fake engines that lag behind each other by random amounts, as real ones do; the
only order they keep is first in, first out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import DeadlineExceeded, Exhausted, Unavailable
from core.pipeline.actions import EmitTokens, FinishReason, FlushUpdates, Refuse, RunMicroBatch
from core.pipeline.events import (
    Event,
    PipelineFacts,
    PipelineLost,
    PipelineReady,
    RequestArrived,
    RequestCancelled,
    StageFacts,
    StageReported,
    Tick,
    TokensSampled,
)
from core.pipeline.scheduler import Scheduler, SchedulerSettings
from core.sampling.parameters import SamplingParameters
from tests.support.fake_engine import FakeEngine, completion, next_token, repeated_token

NUM_STAGES, NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_ROWS = 3, 5, 12, 4, 16
MAX_WAITING = 6


class PipelineMachine(RuleBasedStateMachine):
    """Drives a scheduler and three stages in every order that the streams allow."""

    next_token: ClassVar[Callable[[List[int]], int]] = staticmethod(next_token)
    num_prompt_ids = 100

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.scheduler = Scheduler(
            SchedulerSettings(max_waiting=MAX_WAITING, micro_batch_timeout_s=1e9)
        )
        self.prompts: dict[int, list[int]] = {}
        self.max_tokens: dict[int, int] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ends: dict[int, list[Any]] = {}
        self.batch_rows: list[int] = []
        self._open()

    def _open(self) -> None:
        self.engines = [
            FakeEngine(
                num_kv_blocks=NUM_BLOCKS + stage,
                is_last=stage == NUM_STAGES - 1,
                block_size=BLOCK_SIZE,
                next_token=self.next_token,
            )
            for stage in range(NUM_STAGES)
        ]
        self.orders_S: list[deque[RunMicroBatch | FlushUpdates]] = [
            deque() for _ in range(NUM_STAGES)
        ]
        self.activations_S: list[deque[int]] = [deque() for _ in range(NUM_STAGES)]
        self.results: deque[TokensSampled] = deque()
        facts = PipelineFacts(
            stages=tuple(
                StageFacts(num_kv_blocks=NUM_BLOCKS + stage, max_rows=MAX_ROWS + stage)
                for stage in range(NUM_STAGES)
            ),
            num_slots=NUM_SLOTS,
            context_length=64,
            kv_block_size=BLOCK_SIZE,
        )
        self._handle(PipelineReady(facts=facts))

    # --- the world

    @rule(
        num_shared=st.integers(0, 30),
        num_own=st.integers(1, 10),
        topic=st.integers(0, 1),
        max_tokens=st.integers(1, 12),
        timeout_s=st.one_of(st.none(), st.floats(0.0, 5.0)),
        salt=st.sampled_from(["", "", "", "tenant"]),
    )
    def arrive(
        self,
        num_shared: int,
        num_own: int,
        topic: int,
        max_tokens: int,
        timeout_s: float | None,
        salt: str,
    ) -> None:
        shared = [(7 * topic + index) % self.num_prompt_ids for index in range(num_shared)]
        own = [(7 * len(self.prompts) + index) % self.num_prompt_ids for index in range(num_own)]
        self._arrive(shared + own, max_tokens=max_tokens, timeout_s=timeout_s, salt=salt)

    @precondition(lambda self: any(self.outputs.values()))
    @rule(data=st.data(), num_own=st.integers(1, 6))
    def follow_up(self, data: st.DataObject, num_own: int) -> None:
        """A conversation goes on: prompt and output so far begin the next prompt."""
        talked = [request_id for request_id, output in self.outputs.items() if output]
        request_id = data.draw(st.sampled_from(talked))
        said = self.prompts[request_id] + self.outputs[request_id]
        self._arrive(said[:30] + [3] * num_own, max_tokens=3)

    def _arrive(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        timeout_s: float | None = None,
        salt: str = "",
    ) -> None:
        request_id = len(self.prompts)
        self.prompts[request_id], self.max_tokens[request_id] = prompt, max_tokens
        self.outputs[request_id], self.ends[request_id] = [], []
        self._handle(
            RequestArrived(
                request_id=request_id,
                token_ids=prompt,
                sampling=SamplingParameters(max_tokens=max_tokens),
                deadline_s=None if timeout_s is None else self.now_s + timeout_s,
                cache_salt=salt,
            )
        )

    @precondition(lambda self: self._open_requests())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self._open_requests()))
        self._handle(RequestCancelled(request_id=request_id))
        assert self.ends[request_id] == [FinishReason.CANCELLED]

    @rule(seconds=st.floats(0.0, 1.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self._handle(Tick())

    @rule(stage=st.integers(0, NUM_STAGES - 1), count=st.integers(1, 4))
    def compute(self, stage: int, count: int) -> None:
        """A stage performs some of its orders, as far as their activations are there."""
        for _ in range(count):
            self._compute_one(stage)

    @rule(count=st.integers(1, 3))
    def deliver(self, count: int) -> None:
        results = [self.results.popleft() for _ in range(min(count, len(self.results)))]
        if results:
            self._handle(*results)

    @precondition(lambda self: self.batch_rows)
    @rule(stage=st.integers(0, NUM_STAGES - 1), seconds=st.floats(1e-5, 1.0))
    def report(self, stage: int, seconds: float) -> None:
        rows, self.batch_rows = self.batch_rows, []
        self._handle(
            StageReported(stage_index=stage, batch_rows=rows, batch_seconds=[seconds] * len(rows))
        )

    @rule()
    def lose(self) -> None:
        open_requests = self._open_requests()
        self._handle(PipelineLost(reason="a stage died"))
        for request_id in open_requests:
            assert isinstance(self.ends[request_id][0], Unavailable)
        self._open()

    # --- what must always hold

    @invariant()
    def blocks_are_held_by_running_sequences_only(self) -> None:
        path = self.scheduler._path
        assert path is not None
        for stage, allocator in enumerate(path.mirror.allocators):
            held = Counter(block for s in path.running for block in s.tables_S[stage])
            assert len(held) == allocator.num_used
            assert [held[block] for block in range(allocator.num_blocks)] == allocator._num_holders
        slots = [sequence.slot for sequence in path.running]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < NUM_SLOTS for slot in slots)

    @invariant()
    def counts_fit_each_other(self) -> None:
        scheduler = self.scheduler
        assert scheduler.num_waiting + scheduler.num_running == len(self._open_requests())
        assert scheduler._waiting.num_rows == sum(
            len(s.token_ids) for s in scheduler._waiting._sequences
        )
        orders = [s.order for s in scheduler._waiting._sequences]
        assert orders == sorted(orders)

    @invariant()
    def something_is_in_flight_while_requests_are_open(self) -> None:
        if self._open_requests():
            assert self.scheduler.num_in_flight > 0

    def teardown(self) -> None:
        """Without further events from outside, everything ends right, in bounded time."""
        work = sum(len(p) + self.max_tokens[r] for r, p in self.prompts.items())
        for _ in range(100 + 50 * work):
            if not self._open_requests():
                break
            for stage in range(NUM_STAGES):
                self._compute_one(stage)
            if self.results:
                self._handle(self.results.popleft())
        assert not self._open_requests()
        while self.results or any(self.orders_S):
            for stage in range(NUM_STAGES):
                self._compute_one(stage)
            if self.results:
                self._handle(self.results.popleft())
        assert self.scheduler.kv_blocks_used_S == [0] * NUM_STAGES
        assert [engine.tables for engine in self.engines] == [{}] * NUM_STAGES
        for request_id in self.prompts:
            self._check_end(request_id)

    def _check_end(self, request_id: int) -> None:
        (end,) = self.ends[request_id]
        if end is FinishReason.LENGTH:
            assert len(self.outputs[request_id]) == self.max_tokens[request_id]
        else:
            assert end is FinishReason.CANCELLED or isinstance(
                end, DeadlineExceeded | Exhausted | Unavailable
            )

    # --- performing

    def _open_requests(self) -> list[int]:
        return [request_id for request_id, ends in self.ends.items() if not ends]

    def _handle(self, *events: Event) -> None:
        self.now_s += 0.001
        for action in self.scheduler.handle_all(events, self.now_s):
            match action:
                case RunMicroBatch():
                    assert 0 < len(action.token_ids_T) <= MAX_ROWS
                    self.batch_rows.append(len(action.token_ids_T))
                    self._order(action)
                case FlushUpdates():
                    self._order(action)
                case EmitTokens():
                    self._emit(action)
                case Refuse():
                    assert not self.ends[action.request_id]
                    self.ends[action.request_id].append(action.error)
                case _:
                    raise AssertionError(action)

    def _order(self, action: RunMicroBatch | FlushUpdates) -> None:
        for orders in self.orders_S:
            orders.append(action)

    def _emit(self, action: EmitTokens) -> None:
        request_id = action.request_id
        assert not self.ends[request_id], "news of a request that has ended"
        output = self.outputs[request_id]
        output += action.token_ids
        prompt = self.prompts[request_id]
        assert output == completion(prompt, len(output), self.next_token)
        if action.finish_reason is not None:
            assert action.usage is not None
            assert action.usage.completion_tokens == len(output)
            cached = action.usage.cached_tokens
            assert 0 <= cached < len(self.prompts[request_id])
            assert cached % BLOCK_SIZE == 0
            self.ends[request_id].append(action.finish_reason)

    def _compute_one(self, stage: int) -> None:
        orders, activations = self.orders_S[stage], self.activations_S[stage]
        if not orders:
            return
        order = orders[0]
        if isinstance(order, RunMicroBatch) and stage > 0:
            if not activations:
                return
            assert activations.popleft() == order.micro_batch_id
        orders.popleft()
        self.engines[stage].apply(order.updates_S[stage])
        if isinstance(order, RunMicroBatch):
            self._run(stage, order)

    def _run(self, stage: int, order: RunMicroBatch) -> None:
        batch = order.for_stage(stage)
        sampled = self.engines[stage].run(
            batch.slots_R.tolist(),
            batch.first_positions_R.tolist(),
            batch.num_rows_R.tolist(),
            batch.num_samples_R.tolist(),
            _tokens(order),
        )
        if stage + 1 < NUM_STAGES:
            self.activations_S[stage + 1].append(order.micro_batch_id)
        else:
            self.results.append(
                TokensSampled(micro_batch_id=order.micro_batch_id, token_ids=sampled)
            )


def _tokens(order: RunMicroBatch) -> List[int]:
    return order.token_ids_T


class RepetitivePipelineMachine(PipelineMachine):
    """Its tokens can often be guessed, and the guesses are often wrong."""

    next_token: ClassVar[Callable[[List[int]], int]] = staticmethod(repeated_token)
    num_prompt_ids = 4


_SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None)
PipelineMachine.TestCase.settings = _SETTINGS
RepetitivePipelineMachine.TestCase.settings = _SETTINGS
TestPipeline = PipelineMachine.TestCase
TestRepetitivePipeline = RepetitivePipelineMachine.TestCase
