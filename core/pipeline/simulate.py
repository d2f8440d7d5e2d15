"""Drives the scheduler under a virtual clock with invented or measured stage times.

Stages work first in, first out and never block each other, so a micro-batch's whole way can
be computed when it is launched: it begins on a stage when it has arrived and the stage has
finished the one before.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.pipeline.actions import Action, EmitTokens, Refuse, RunMicroBatch
from core.pipeline.batch_time import Coefficients
from core.pipeline.events import (
    Event,
    PipelineFacts,
    PipelineReady,
    RequestArrived,
    StageFacts,
    StageReported,
    TokensSampled,
)
from core.pipeline.scheduler import Scheduler, SchedulerSettings
from core.sampling.parameters import SamplingParameters

_REPORT_S = 0.1


@dataclass(frozen=True, kw_only=True)
class SimulatedRequest:
    """A request that arrives at a given second and generates exactly `num_output` tokens."""

    arrival_s: float
    num_prompt: int
    num_output: int
    # Where given, as long as `num_prompt`; else the prompt shares nothing with any other one.
    token_ids: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """The simulated pipeline."""

    stages: tuple[Coefficients, ...]  # true times of each stage
    hop_s: float = 0.0  # between two stages, and from and to the coordinator
    jitter: float = 0.0  # each stage time is multiplied by uniform(1 - jitter, 1 + jitter)
    seed: int = 0
    num_kv_blocks: int = 100_000
    kv_block_size: int = 16
    num_slots: int = 4096
    max_rows: int = 512
    context_length: int = 1 << 20
    until_s: float = float("inf")  # stops here; else when all requests have ended
    warm_up_s: float = 0.0  # shares and rates count from here on
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)


@dataclass(frozen=True, kw_only=True)
class SimulationReport:
    """What the simulated pipeline did after its warm-up."""

    seconds: float  # of virtual time
    busy_S: tuple[float, ...]  # share of time that each stage computed; the rest is bubble
    tokens_per_second: float
    time_to_first_token_s: tuple[float, ...]  # of each request that got one, in order of arrival
    longest_gap_s: float  # between two tokens of one request
    mean_in_flight: float  # micro-batches
    mean_rows: float  # of a micro-batch
    num_preemptions: int
    cached_share: float  # of the prompt tokens of all requests that got a token
    num_ended: int  # requests

    @property
    def bubble_S(self) -> tuple[float, ...]:
        return tuple(1.0 - busy for busy in self.busy_S)


def simulate(
    requests: Sequence[SimulatedRequest], settings: SimulationSettings
) -> SimulationReport:
    """Runs the requests through the real scheduler on a simulated pipeline. Deterministic."""
    return _Simulation(requests, settings).run()


class _Simulation:
    def __init__(self, requests: Sequence[SimulatedRequest], settings: SimulationSettings) -> None:
        self._settings = settings
        self._requests = requests
        self._random = random.Random(settings.seed)
        self._scheduler = Scheduler(settings.scheduler)
        # No token comes twice, so that there is nothing to guess.
        self._token_ids = itertools.count(settings.context_length)
        self._events: list[tuple[float, int, Event]] = []
        self._num_events = 0
        self._free_at_S = [0.0] * len(settings.stages)
        self._busy_S = [0.0] * len(settings.stages)
        self._reports_S: list[StageReported | None] = [None] * len(settings.stages)
        self._last_token_s: dict[int, float] = {}
        self._first_token_s: dict[int, float] = {}
        self._num_tokens = self._num_ended = self._num_batches = self._num_rows = 0
        self._flight_s = self._longest_gap_s = self._now_s = 0.0
        self._was_cut_off = False

    def run(self) -> SimulationReport:
        self._push(0.0, PipelineReady(facts=self._facts()))
        for number, request in enumerate(self._requests):
            arrived = RequestArrived(
                request_id=number,
                token_ids=request.token_ids or [number] * request.num_prompt,
                sampling=SamplingParameters(max_tokens=request.num_output, ignore_eos=True),
            )
            self._push(request.arrival_s, arrived)
        while self._events and self._num_ended < len(self._requests):
            if self._events[0][0] > self._settings.until_s:
                self._was_cut_off = True
                break
            self._step()
        return self._report()

    def _facts(self) -> PipelineFacts:
        settings = self._settings
        stage = StageFacts(num_kv_blocks=settings.num_kv_blocks, max_rows=settings.max_rows)
        return PipelineFacts(
            stages=(stage,) * len(settings.stages),
            num_slots=settings.num_slots,
            context_length=settings.context_length,
            kv_block_size=settings.kv_block_size,
        )

    def _push(self, time_s: float, event: Event) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def _step(self) -> None:
        """Hands the scheduler everything that happens at the next instant."""
        self._now_s = now_s = self._events[0][0]
        events = []
        while self._events and self._events[0][0] == now_s:
            event = heapq.heappop(self._events)[2]
            if isinstance(event, StageReported):
                self._reports_S[event.stage_index] = None
            events.append(event)
        for action in self._scheduler.handle_all(events, now_s):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case RunMicroBatch():
                self._compute(action)
            case EmitTokens():
                self._count(action)
            case Refuse():
                self._num_ended += 1
            case _:
                pass

    def _compute(self, action: RunMicroBatch) -> None:
        settings = self._settings
        rows = len(action.token_ids_T)
        pairs = sum(
            count * (first + 0.5 * count)
            for first, count in zip(action.first_positions_R, action.num_rows_R, strict=True)
        )
        time_s = self._now_s + settings.hop_s
        for stage, times in enumerate(settings.stages):
            begin_s = max(time_s, self._free_at_S[stage])
            factor = 1.0 + settings.jitter * (2.0 * self._random.random() - 1.0)
            seconds = times.seconds(rows, pairs) * factor
            time_s = begin_s + seconds
            self._free_at_S[stage] = time_s
            self._busy_S[stage] += self._counted(begin_s, time_s)
            self._note(stage, rows, seconds, time_s)
            time_s += settings.hop_s
        token_ids = [next(self._token_ids) for _ in range(sum(action.num_samples_R))]
        self._push(time_s, TokensSampled(micro_batch_id=action.micro_batch_id, token_ids=token_ids))
        if self._now_s >= settings.warm_up_s:
            self._num_batches += 1
            self._num_rows += rows
        self._flight_s += self._counted(self._now_s, time_s)

    def _counted(self, begin_s: float, end_s: float) -> float:
        """Seconds of an interval that lie within what is measured."""
        settings = self._settings
        return max(min(end_s, settings.until_s) - max(begin_s, settings.warm_up_s), 0.0)

    def _note(self, stage: int, rows: int, seconds: float, end_s: float) -> None:
        """Adds to the stage's next report; one is on its way as long as it is busy."""
        report = self._reports_S[stage]
        if report is None or len(report.batch_rows) >= 64:
            report = StageReported(stage_index=stage, batch_rows=[], batch_seconds=[])
            self._reports_S[stage] = report
            self._push(end_s + _REPORT_S, report)
        assert isinstance(report.batch_rows, list)
        assert isinstance(report.batch_seconds, list)
        report.batch_rows.append(rows)
        report.batch_seconds.append(seconds)

    def _count(self, action: EmitTokens) -> None:
        if action.token_ids:
            request_id = action.request_id
            last_s = self._last_token_s.get(request_id)
            if last_s is None:
                self._first_token_s[request_id] = self._now_s
            elif self._now_s >= self._settings.warm_up_s:
                self._longest_gap_s = max(self._longest_gap_s, self._now_s - last_s)
            self._last_token_s[request_id] = self._now_s
            if self._now_s >= self._settings.warm_up_s:
                self._num_tokens += len(action.token_ids)
        if action.finish_reason is not None:
            self._num_ended += 1

    def _report(self) -> SimulationReport:
        settings = self._settings
        end_s = settings.until_s if self._was_cut_off else self._now_s
        seconds = max(end_s - settings.warm_up_s, 1e-9)
        return SimulationReport(
            seconds=seconds,
            busy_S=tuple(busy / seconds for busy in self._busy_S),
            tokens_per_second=self._num_tokens / seconds,
            time_to_first_token_s=tuple(
                self._first_token_s[number] - request.arrival_s
                for number, request in enumerate(self._requests)
                if number in self._first_token_s
            ),
            longest_gap_s=self._longest_gap_s,
            mean_in_flight=self._flight_s / seconds,
            mean_rows=self._num_rows / max(self._num_batches, 1),
            num_preemptions=self._scheduler.num_preemptions,
            cached_share=(
                self._scheduler.num_cached_tokens / max(self._scheduler.num_prompt_tokens, 1)
            ),
            num_ended=self._num_ended,
        )
