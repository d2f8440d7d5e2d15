"""A scheduler over exact replicas: what was asked, what came of it, and faults at any step.

Nothing happens by itself. A test receives, computes and delivers step by step, in any order that
the streams allow, or lets everything go on until it is `quiet`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.pipeline.actions import (
    AbandonMicroBatches,
    Action,
    DropReplica,
    EmitTokens,
    FinishReason,
    FlushUpdates,
    Refuse,
    RunMicroBatch,
    Usage,
)
from core.pipeline.cut import Part
from core.pipeline.events import (
    Event,
    LinkLost,
    LinkReady,
    PipelineFacts,
    PipelineKnown,
    ReplicaFacts,
    ReplicaLost,
    ReplicaReady,
    RequestArrived,
)
from core.pipeline.scheduler import Scheduler
from core.pipeline.settings import SchedulerSettings
from core.sampling.parameters import SamplingParameters
from tests.support.exact_replicas import ExactReplica, ExactReplicas, NextToken
from tests.support.fake_engine import completion, next_token

STEP_S = 0.001  # of the clock, with each turn of the scheduler


@dataclass
class Asked:
    """A request and what it was answered."""

    prompt: list[int]
    max_tokens: int
    num_before: int = 0  # tokens of the output that came with the request
    output: list[int] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)  # finish reasons and errors: one, in the end
    usage: Usage | None = None

    @property
    def is_open(self) -> bool:
        return not self.ends


class ExactPipeline:
    """All replicas whose layers join up are linked, until a test cuts a link.

    Stages have one layer each, or as many as `num_layers_S` says.
    """

    def __init__(
        self,
        *num_replicas_S: int,
        num_stages: int = 0,
        num_layers_S: Sequence[int] = (),
        num_kv_blocks: int = 64,
        block_size: int = 4,
        max_rows: int = 64,
        num_slots: int = 8,
        context_length: int = 256,
        settings: SchedulerSettings | None = None,
        next_token: NextToken = next_token,
    ) -> None:
        self.scheduler = Scheduler(settings or SchedulerSettings(lost_limit_s=1e9))
        self.now_s = 0.0
        self.asked: dict[int, Asked] = {}
        self.actions: list[Action] = []  # of the latest turn
        self.batches: list[RunMicroBatch] = []  # all
        self.news: deque[Event] = deque()  # of losses that the scheduler does not know of yet
        self.next_token = next_token
        self.num_kv_blocks = num_kv_blocks
        self.max_rows = max_rows
        self.num_stages = num_stages or len(num_replicas_S)
        self.num_layers_S = num_layers_S or (1,) * self.num_stages
        self.exact = ExactReplicas(
            num_layers=sum(self.num_layers_S), block_size=block_size, next_token=next_token
        )
        facts = PipelineFacts(
            num_layers=sum(self.num_layers_S),
            num_slots=num_slots,
            context_length=context_length,
            kv_block_size=block_size,
        )
        self.handle(PipelineKnown(facts=facts))
        self._num_opened = 0
        for stage, count in enumerate(num_replicas_S):
            for _ in range(count):
                self.open(stage)

    # --- replicas and links

    @property
    def replicas(self) -> list[ExactReplica]:
        return list(self.exact.replicas.values())

    def of_stage(self, stage: int) -> list[int]:
        """Ids of the replicas of a stage that live."""
        layers = self.part(stage).layers
        return [replica.id for replica in self.replicas if replica.part.layers == layers]

    def part(self, stage: int, *, weights: str = "") -> Part:
        """What a replica of a stage holds."""
        first_layer = sum(self.num_layers_S[:stage])
        return Part(first_layer, (weights,) * self.num_layers_S[stage])

    def open(self, stage: int, *, weights: str = "", **options: Any) -> int:
        """Opens a replica of a stage; `options` are `open_part`'s."""
        return self.open_part(self.part(stage, weights=weights), **options)

    def open_part(self, part: Part, *, is_spare: bool = False, num_kv_blocks: int = 0) -> int:
        """Opens a replica, linked with all that hold the layers before and behind its own."""
        self._num_opened += 1
        replica_id = self._num_opened
        blocks = num_kv_blocks or self.num_kv_blocks + part.first_layer
        self.exact.add(replica_id, part=part, num_kv_blocks=blocks)
        facts = ReplicaFacts(
            num_kv_blocks=blocks, max_rows=self.max_rows, part=part, is_spare=is_spare
        )
        self.handle(ReplicaReady(replica_id=replica_id, facts=facts))
        for upstream_id, downstream_id in self.broken_links():
            if replica_id in (upstream_id, downstream_id):
                self.connect(upstream_id, downstream_id)
        return replica_id

    def broken_links(self) -> list[tuple[int, int]]:
        """The links that should be there and are not."""
        return [
            (upstream.id, downstream.id)
            for upstream in self.replicas
            for downstream in self.replicas
            if upstream.part.end_layer == downstream.part.first_layer
            and (upstream.id, downstream.id) not in self.exact.links
        ]

    def connect(self, upstream_id: int, downstream_id: int) -> None:
        """Opens a link, once the scheduler knows that the one before has broken."""
        self.tell()
        self.exact.connect(upstream_id, downstream_id)
        self.handle(LinkReady(upstream_id=upstream_id, downstream_id=downstream_id))

    def kill(self, replica_id: int, *, tells: bool = True) -> None:
        """Ends a replica; the scheduler hears of it now, or later."""
        self.exact.kill(replica_id)
        self.news.append(ReplicaLost(replica_id=replica_id, reason="it was killed"))
        if tells:
            self.tell()

    def cut(self, upstream_id: int, downstream_id: int, *, tells: bool = True) -> None:
        """Breaks a link; the scheduler hears of it now, or later."""
        self.exact.cut(upstream_id, downstream_id)
        self.news.append(
            LinkLost(upstream_id=upstream_id, downstream_id=downstream_id, reason="it was cut")
        )
        if tells:
            self.tell()

    def tell(self) -> None:
        """The scheduler hears of all losses."""
        news = list(self.news)
        self.news.clear()
        if news:
            self.handle(*news)

    # --- requests

    def ask(self, prompt: Sequence[int], *, max_tokens: int = 4, **fields: Any) -> int:
        """A new request; `fields` are of the event, or of its sampling."""
        event = self.request(prompt, max_tokens=max_tokens, **fields)
        self.handle(event)
        return event.request_id

    def request(
        self, prompt: Sequence[int], *, max_tokens: int = 4, **fields: Any
    ) -> RequestArrived:
        """The event of a new request."""
        request_id = len(self.asked)
        num_before = fields.get("num_output_tokens", 0)
        own = prompt[: len(prompt) - num_before]
        self.asked[request_id] = Asked(list(own), max_tokens, num_before)
        of_event = (
            *("deadline_s", "cache_salt", "tenant", "priority"),
            *("num_output_tokens", "probed", "began_on"),
        )
        event_fields = {name: fields.pop(name) for name in of_event if name in fields}
        sampling = SamplingParameters(max_tokens=max_tokens, ignore_eos=True, **fields)
        return RequestArrived(
            request_id=request_id, token_ids=list(prompt), sampling=sampling, **event_fields
        )

    @property
    def open_requests(self) -> list[int]:
        return [request_id for request_id, asked in self.asked.items() if asked.is_open]

    # --- time

    def handle(self, *events: Event) -> list[Action]:
        """One turn of the scheduler; its actions are performed."""
        self.now_s += STEP_S
        self.actions = self.scheduler.handle_all(events, self.now_s)
        actions = self.actions
        for action in actions:
            match action:
                case RunMicroBatch():
                    self.batches.append(action)
                    self.exact.perform(action)
                case FlushUpdates() | AbandonMicroBatches():
                    self.exact.perform(action)
                case EmitTokens():
                    self._emit(action)
                case Refuse():
                    self._end(action.request_id, action.error, action.usage)
                case DropReplica():
                    # One that died may be found out by its silence before anybody tells.
                    if action.replica_id in self.exact.replicas:
                        self.exact.kill(action.replica_id)
        return actions

    def deliver(self, replica: ExactReplica, *, count: int = 1) -> None:
        """The scheduler hears what a replica has said."""
        said = [replica.outbox.popleft() for _ in range(min(count, len(replica.outbox)))]
        if said:
            self.handle(*said)

    def turn(self) -> bool:
        """Every replica takes in a message and an order, and is heard once. False: all is quiet."""
        has_moved = False
        for replica in self.replicas:
            has_moved = replica.receive() or has_moved
            has_moved = replica.step() or has_moved
            if replica.outbox:
                has_moved = True
                self.deliver(replica)
        return has_moved

    def finish(self, *, most_turns: int = 10_000) -> None:
        """Lets all go on until nothing happens any more."""
        self.tell()
        for _ in range(most_turns):
            if not self.turn():
                return
        raise AssertionError("it never comes to rest")

    def answers(self) -> list[bool]:
        """Of each request, whether it was answered in full. What was said must be right."""
        return [
            asked.ends == [FinishReason.LENGTH]
            and asked.output == self._expected(asked, asked.max_tokens)
            for asked in self.asked.values()
        ]

    def _expected(self, asked: Asked, count: int) -> list[int]:
        return completion(asked.prompt, count, self.next_token)[asked.num_before :]

    def _emit(self, action: EmitTokens) -> None:
        asked = self.asked[action.request_id]
        assert asked.is_open, "news of a request that has ended"
        asked.output += action.token_ids
        count = asked.num_before + len(asked.output)
        assert asked.output == self._expected(asked, count), "other tokens than without faults"
        if action.finish_reason is not None:
            assert action.usage is not None
            assert action.usage.completion_tokens == count
            assert action.usage.prompt_tokens == len(asked.prompt)
            self._end(action.request_id, action.finish_reason, action.usage)

    def _end(self, request_id: int, end: object, usage: Usage | None) -> None:
        asked = self.asked[request_id]
        assert asked.is_open, "a request ends twice"
        asked.ends.append(end)
        asked.usage = usage
