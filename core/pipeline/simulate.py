"""Drives the scheduler under a virtual clock with invented or measured stage times.

Replicas work first in, first out, so a micro-batch's whole way can be computed when it is
launched: it begins on a replica when it has arrived and the replica has finished the one before.
What replicas abandon leaves a gap in their work only where nothing was planned behind it yet.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.pipeline.actions import (
    AbandonMicroBatches,
    Action,
    DropReplica,
    EmitTokens,
    Refuse,
    RunMicroBatch,
)
from core.pipeline.batch_time import Coefficients
from core.pipeline.cut import Cut, Part
from core.pipeline.events import (
    CutChosen,
    Event,
    LinkLost,
    LinkReady,
    PipelineFacts,
    PipelineKnown,
    ReplicaDraining,
    ReplicaFacts,
    ReplicaLost,
    ReplicaReady,
    RequestArrived,
    StageReported,
    TokensSampled,
)
from core.pipeline.scheduler import Scheduler
from core.pipeline.settings import SchedulerSettings
from core.sampling.parameters import SamplingParameters

_REPORT_S = 0.1


@dataclass(frozen=True, kw_only=True)
class SimulatedRequest:
    """A request that arrives at a given second and generates exactly `num_output` tokens."""

    arrival_s: float
    num_prompt: int
    num_output: int
    priority: int = 0
    token_ids: Sequence[int] = ()  # `num_prompt`; none: it has nothing in common with others


@dataclass(frozen=True, kw_only=True)
class SimulatedFault:
    """A replica is lost, or its link to a replica of the next stage."""

    at_s: float
    replica: int  # its number: those of `stages` from 0, then those of `further_replicas`
    downstream: int | None = None  # None: the replica itself; else the link is lost
    back_s: float | None = None  # when it is there again, empty; None: never


@dataclass(frozen=True, kw_only=True)
class SimulatedRecut:
    """The layers move to other replicas. Those of layers that both cuts have stay."""

    at_s: float  # when the new replicas are ready, and chosen
    stages: tuple[Coefficients, ...]
    num_layers_S: tuple[int, ...]
    moves: bool = True  # running sequences, too; else they end where they are


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """The simulated pipeline."""

    stages: tuple[Coefficients, ...]  # true times of each stage
    num_layers_S: tuple[int, ...] = ()  # where they do not have one layer each
    recut: SimulatedRecut | None = None
    further_replicas: tuple[tuple[int, Coefficients], ...] = ()  # of which stage, and its times
    faults: tuple[SimulatedFault, ...] = ()
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
    busy_S: tuple[float, ...]  # share of time that replicas computed, by stage; the rest is bubble
    tokens_per_second: float
    time_to_first_token_s: tuple[float, ...]  # of each request that got one, in order of arrival
    longest_gap_s: float  # between two tokens of one request
    mean_in_flight: float  # micro-batches
    mean_rows: float  # of a micro-batch
    num_preemptions: int
    num_failovers: int
    num_restored_tokens: int
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


@dataclass(slots=True, eq=False, kw_only=True)
class _Replica:
    """A simulated replica. Another one takes its place when it comes back."""

    id: int
    stage_index: int  # their number: it came with a recut
    part: Part
    times: Coefficients
    free_at_s: float = 0.0
    work: deque[tuple[int, float, float]] = field(default_factory=deque)  # id, beginning, end
    report: StageReported | None = None


class _Simulation:
    def __init__(self, requests: Sequence[SimulatedRequest], settings: SimulationSettings) -> None:
        self._settings = settings
        self._requests = requests
        self._random = random.Random(settings.seed)
        self._scheduler = Scheduler(settings.scheduler)
        # No token comes twice, so that there is nothing to guess.
        self._token_ids = itertools.count(settings.context_length)
        self._events: list[tuple[float, int, Event | _Replica]] = []
        self._num_events = 0
        self._replicas: dict[int, _Replica] = {}  # by id, those that live
        self._ids: list[int] = []  # of each number, the latest
        self._replica_ids = itertools.count()
        self._parts_S = _parts(settings.num_layers_S or (1,) * len(settings.stages))
        self._busy_S = [0.0] * (len(settings.stages) + 1)  # of a recut's replicas: the last
        self._last_token_s: dict[int, float] = {}
        self._first_token_s: dict[int, float] = {}
        self._num_tokens = self._num_ended = self._num_batches = self._num_rows = 0
        self._flight_s = self._longest_gap_s = self._now_s = 0.0
        self._was_cut_off = False

    def run(self) -> SimulationReport:
        self._push(0.0, PipelineKnown(facts=self._facts()))
        kinds = (*enumerate(self._settings.stages), *self._settings.further_replicas)
        for stage_index, times in kinds:
            self._ids.append(self._open(0.0, stage_index, times))
        self._plan_faults()
        if self._settings.recut is not None:
            self._plan_recut(self._settings.recut)
        for number, request in enumerate(self._requests):
            arrived = RequestArrived(
                request_id=number,
                token_ids=request.token_ids or [number] * request.num_prompt,
                sampling=SamplingParameters(max_tokens=request.num_output, ignore_eos=True),
                priority=request.priority,
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
        return PipelineFacts(
            num_layers=self._parts_S[-1].end_layer,
            num_slots=settings.num_slots,
            context_length=settings.context_length,
            kv_block_size=settings.kv_block_size,
        )

    # --- replicas

    def _open(self, time_s: float, stage_index: int, times: Coefficients) -> int:
        return self._open_part(time_s, self._parts_S[stage_index], times, stage_index=stage_index)

    def _open_part(self, at_s: float, part: Part, times: Coefficients, *, stage_index: int) -> int:
        """Plans that a replica is ready, linked with all that are there by then; its id."""
        replica_id = next(self._replica_ids)
        replica = _Replica(id=replica_id, stage_index=stage_index, part=part, times=times)
        self._push(at_s, replica)
        return replica_id

    def _plan_recut(self, recut: SimulatedRecut) -> None:
        new = _parts(recut.num_layers_S)
        for part, times in zip(new, recut.stages, strict=True):
            if part not in self._parts_S:
                self._open_part(recut.at_s, part, times, stage_index=len(self._parts_S))
        self._push(recut.at_s, CutChosen(cut=Cut(new)))
        stages = (*range(len(self._parts_S)), *(s for s, _ in self._settings.further_replicas))
        for replica_id, stage_index in zip(self._ids, stages, strict=True):
            if self._parts_S[stage_index] not in new:
                self._push(recut.at_s, ReplicaDraining(replica_id=replica_id, moves=recut.moves))

    def _ready(self, replica: _Replica) -> list[Event]:
        settings = self._settings
        facts = ReplicaFacts(
            num_kv_blocks=settings.num_kv_blocks, max_rows=settings.max_rows, part=replica.part
        )
        ready = ReplicaReady(replica_id=replica.id, facts=facts)
        links = [
            LinkReady(upstream_id=upstream.id, downstream_id=downstream.id)
            for other in self._replicas.values()
            for upstream, downstream in ((other, replica), (replica, other))
            if upstream.part.end_layer == downstream.part.first_layer
        ]
        self._replicas[replica.id] = replica
        return [ready, *links]

    def _plan_faults(self) -> None:
        """In order of time, so that a replica that comes back can be lost again."""
        kinds = (*enumerate(self._settings.stages), *self._settings.further_replicas)
        for fault in sorted(self._settings.faults, key=lambda fault: fault.at_s):
            lost_id = self._ids[fault.replica]
            if fault.downstream is not None:
                ids = {"upstream_id": lost_id, "downstream_id": self._ids[fault.downstream]}
                self._push(fault.at_s, LinkLost(**ids, reason="a fault"))
                if fault.back_s is not None:
                    self._push(fault.back_s, LinkReady(**ids))
                continue
            self._push(fault.at_s, ReplicaLost(replica_id=lost_id, reason="a fault"))
            if fault.back_s is not None:
                self._ids[fault.replica] = self._open(fault.back_s, *kinds[fault.replica])

    # --- time

    def _push(self, time_s: float, event: Event | _Replica) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def _step(self) -> None:
        """Hands the scheduler everything that happens at the next instant."""
        self._now_s = now_s = self._events[0][0]
        events: list[Event] = []
        while self._events and self._events[0][0] == now_s:
            event = heapq.heappop(self._events)[2]
            if isinstance(event, _Replica):
                events += self._ready(event)
                continue
            if isinstance(event, StageReported) and event.replica_id in self._replicas:
                self._replicas[event.replica_id].report = None
            elif isinstance(event, ReplicaLost):
                self._replicas.pop(event.replica_id, None)
            events.append(event)
        for action in self._scheduler.handle_all(events, now_s):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case RunMicroBatch():
                self._compute(action)
            case AbandonMicroBatches():
                self._abandon(action)
            case EmitTokens():
                self._count(action)
            case Refuse():
                self._num_ended += 1
            case DropReplica():
                raise AssertionError(f"simulated replicas do not hang: {action.reason}")
            case _:
                pass

    def _compute(self, action: RunMicroBatch) -> None:
        settings = self._settings
        rows = sum(action.num_rows_R)
        pairs = sum(
            count * (first + 0.5 * count)
            for first, count in zip(action.first_positions_R, action.num_rows_R, strict=True)
        )
        time_s = self._now_s + settings.hop_s
        for number, replica_id in enumerate(action.path):
            replica = self._replicas[replica_id]
            begin_s = max(time_s, replica.free_at_s)
            factor = 1.0 + settings.jitter * (2.0 * self._random.random() - 1.0)
            seconds = replica.times.seconds(rows, pairs) * factor
            if action.replays and number == 0:
                seconds = 0.0
            time_s = begin_s + seconds
            self._occupy(replica, action.micro_batch_id, begin_s, time_s)
            if seconds:
                self._note(replica, rows, seconds)
            time_s += settings.hop_s
        token_ids = [next(self._token_ids) for _ in range(sum(action.num_samples_R))]
        self._push(time_s, TokensSampled(micro_batch_id=action.micro_batch_id, token_ids=token_ids))
        if self._now_s >= settings.warm_up_s:
            self._num_batches += 1
            self._num_rows += rows
        self._flight_s += self._counted(self._now_s, time_s)

    def _occupy(self, replica: _Replica, batch_id: int, begin_s: float, end_s: float) -> None:
        while replica.work and replica.work[0][2] <= self._now_s:
            replica.work.popleft()
        replica.work.append((batch_id, begin_s, end_s))
        replica.free_at_s = end_s
        self._busy_S[replica.stage_index] += self._counted(begin_s, end_s)

    def _abandon(self, action: AbandonMicroBatches) -> None:
        """Drops planned work that has not begun."""
        replica, ids = self._replicas[action.replica_id], set(action.micro_batch_ids)
        dropped = [work for work in replica.work if work[0] in ids and work[1] > self._now_s]
        for work in dropped:
            replica.work.remove(work)
            self._busy_S[replica.stage_index] -= self._counted(work[1], work[2])
        replica.free_at_s = max((end_s for _, _, end_s in replica.work), default=self._now_s)

    def _counted(self, begin_s: float, end_s: float) -> float:
        """Seconds of an interval that lie within what is measured."""
        settings = self._settings
        return max(min(end_s, settings.until_s) - max(begin_s, settings.warm_up_s), 0.0)

    def _note(self, replica: _Replica, rows: int, seconds: float) -> None:
        """Adds to the replica's next report; one is on its way as long as it is busy."""
        report = replica.report
        if report is None or len(report.batch_rows) >= 64:
            report = StageReported(replica_id=replica.id, batch_rows=[], batch_seconds=[])
            replica.report = report
            self._push(replica.free_at_s + _REPORT_S, report)
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
        stages = [stage for stage, _ in settings.further_replicas]
        num_replicas_S = [1 + stages.count(stage) for stage in range(len(settings.stages))]
        return SimulationReport(
            seconds=seconds,
            busy_S=tuple(
                busy / seconds / count
                for busy, count in zip(self._busy_S, num_replicas_S, strict=False)
            ),
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
            num_failovers=self._scheduler.num_failovers,
            num_restored_tokens=self._scheduler.num_restored_tokens,
            cached_share=(
                self._scheduler.num_cached_tokens / max(self._scheduler.num_prompt_tokens, 1)
            ),
            num_ended=self._num_ended,
        )


def _parts(num_layers_S: Sequence[int]) -> tuple[Part, ...]:
    """Neighbouring parts with so many layers."""
    firsts = itertools.accumulate(num_layers_S, initial=0)
    return tuple(
        Part(first, ("",) * count) for first, count in zip(firsts, num_layers_S, strict=False)
    )
