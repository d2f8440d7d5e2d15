"""The replicas, links and paths of one pipeline, and all that is under way on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from core.pipeline.actions import Action, FlushUpdates, RunMicroBatch
from core.pipeline.admission import Admission
from core.pipeline.events import (
    CutChosen,
    LinkLost,
    LinkReady,
    PipelineFacts,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    StageReported,
    TokensSampled,
)
from core.pipeline.failover import Failover
from core.pipeline.flights import Traffic
from core.pipeline.mirror import Mirror
from core.pipeline.outliers import Outliers
from core.pipeline.path import Landed, Path, Shared
from core.pipeline.policy import PolicySettings
from core.pipeline.progress import Stall, begin_anew, find_stall
from core.pipeline.replica import Replica
from core.pipeline.speculation import Speculation
from core.pipeline.stage_times import StageTimes
from core.pipeline.topology import Topology

ReplicaEvent = (
    StageReported | ReplicaReady | ReplicaLost | ReplicaDraining | LinkReady | LinkLost | CutChosen
)


class Pipeline:
    """Nothing runs before a path stands: `is_ready`."""

    def __init__(
        self,
        facts: PipelineFacts,
        *,
        policy: PolicySettings,
        shares_prefixes: bool,
        speculation: Speculation,
        ids: Iterator[int],
        tenant_weights: Mapping[str, float],
    ) -> None:
        """`ids` numbers micro-batches, upwards."""
        self.facts = facts
        self.traffic = Traffic()
        mirror = Mirror(
            num_slots=facts.num_slots,
            block_size=facts.kv_block_size,
            shares_prefixes=shares_prefixes,
            traffic=self.traffic,
        )
        self.admission = Admission(mirror, self.traffic, tenant_weights=tenant_weights)
        shared = Shared(
            facts=facts,
            settings=policy,
            traffic=self.traffic,
            mirror=mirror,
            admission=self.admission,
            speculation=speculation,
            ids=ids,
        )
        self.topology = Topology(facts.num_layers)
        self.failover = Failover(self.topology, shared)
        self._outliers = Outliers(self.topology)
        self.was_ready = False  # ever
        self.num_kv_blocks = 0  # that a sequence could have on the roomiest lane seen last
        self._policy = policy

    # --- what there is to see

    @property
    def is_ready(self) -> bool:
        """Whether new sequences have a path."""
        return bool(self.admission.lanes)

    @property
    def num_running(self) -> int:
        return sum(len(path.running) for path in self.failover.paths.values())

    def is_given_up(self, now_s: float, *, limit_s: float) -> bool:
        """Whether new sequences have had no path for too long."""
        down_since_s = self.admission.down_since_s.get(None, now_s)
        return not self.is_ready and now_s - down_since_s > limit_s

    # --- replicas and links

    def change(self, event: ReplicaEvent) -> list[Action]:
        """Takes in what becomes of replicas and links."""
        replicas, failover = self.topology.replicas, self.failover
        match event:
            case StageReported():
                if (replica := replicas.get(event.replica_id)) is not None:
                    self._outliers.judge(replica, replica.observe(event))
                return []
            case ReplicaReady():
                self._add(event)
            case ReplicaLost():
                if (replica := replicas.get(event.replica_id)) is not None:
                    return failover.lose_replica(replica)
            case ReplicaDraining():
                if (replica := replicas.get(event.replica_id)) is not None:
                    replica.is_draining = True
                    replica.is_evacuated = replica.is_evacuated or event.moves
            case LinkReady():
                self.topology.link(event.upstream_id, event.downstream_id)
            case LinkLost():
                upstream = replicas.get(event.upstream_id)
                downstream = replicas.get(event.downstream_id)
                if upstream is not None and downstream is not None:
                    return failover.lose_link(upstream, downstream)
            case CutChosen():
                self.topology.chosen = event.cut
        failover.is_due = True
        return []

    def _add(self, event: ReplicaReady) -> None:
        """Takes in a replica. What is known of others with its layers it begins with."""
        sibling, gain_alone = self.topology.sibling(event.facts.part), event.facts.gain_alone
        if sibling is None:
            policy = self._policy
            times = StageTimes(
                policy.prior, contention=policy.contention_prior, gain_alone=gain_alone
            )
        else:
            times = sibling.times.for_sibling(gain_alone=gain_alone)
        self.topology.add(
            Replica(
                event.replica_id,
                facts=event.facts,
                block_size=self.facts.kv_block_size,
                times=times,
            )
        )

    def find_stall(self, now_s: float, *, timeout_s: float, was_away: bool) -> Stall | None:
        """A replica that makes no progress, if there is one. `was_away`: nothing that came could
        be taken in for a while."""
        if was_away:
            begin_anew(self.traffic, now_s)
        return find_stall(self.traffic, now_s, timeout_s=timeout_s)

    # --- micro-batches

    def land(self, event: TokensSampled, now_s: float) -> list[Landed]:
        """Takes a micro-batch back; returns what it brings to whom. Nothing where it was lost.

        Raises ProtocolViolation when it is out of order or its tokens are too few or many.
        """
        flight = self.traffic.flights.get(event.micro_batch_id)
        return [] if flight is None else flight.path.land(flight, event, now_s)

    def settle(self, now_s: float) -> None:
        """Acts upon changes of replicas and links, if there are any."""
        if not self.failover.is_due:
            return
        self.failover.settle(now_s)
        if self.admission.lanes:
            self.was_ready = True
            self.num_kv_blocks = max(lane.num_kv_blocks for lane in self.admission.lanes)

    def schedule(self, now_s: float) -> list[Action]:
        """Gives sequences paths, launches micro-batches, tells idle replicas their updates."""
        actions: list[Action] = []
        if self._outliers.review(now_s):
            self.failover.is_due = True
        self.settle(now_s)
        if self.failover.has_closing:
            self.failover.evacuate(now_s)
        paths = list(self.failover.paths.values())
        self._launch(paths, actions, now_s)
        self._mark_alone(actions)
        for replica in self.topology.replicas.values():
            if not replica.is_told and not replica.flights:
                updates = replica.take_updates()
                actions.append(FlushUpdates(replica_id=replica.id, updates=updates))
        return actions

    def _launch(self, paths: list[Path], actions: list[Action], now_s: float) -> None:
        """Until none has anything to launch: what one takes in may let another one go on."""
        has_launched = True
        while has_launched:
            has_launched = False
            for path in paths:
                launched = path.schedule(now_s)
                actions += launched
                has_launched = has_launched or bool(launched)
            if len(paths) == 1:
                return

    def _mark_alone(self, actions: list[Action]) -> None:
        """Marks what may have a machine to itself, once all that goes out now is known."""
        for action in actions:
            if isinstance(action, RunMicroBatch):
                flight = self.traffic.flights[action.micro_batch_id]
                action.is_alone = self.traffic.leaves_others_idle(flight)
                if flight.restored:  # whether others of its path are in flight tells nothing here
                    flight.overlapped = not action.is_alone
