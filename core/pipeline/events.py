"""What happens to a pipeline: the inputs of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.pipeline.batch import NO_TOKEN, PositionLogprobs
from core.pipeline.cut import Cut, Part
from core.sampling.parameters import SamplingParameters


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFacts:
    """What the scheduler must know of the model and of all stages alike."""

    num_layers: int
    num_slots: int  # most sequences at a time; slots are below this
    context_length: int  # most positions of a sequence
    kv_block_size: int = 16  # positions in a KV block
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = NO_TOKEN  # token ids are below this


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaFacts:
    """What the scheduler must know of one replica of a stage."""

    num_kv_blocks: int
    max_rows: int  # most rows of a micro-batch
    # Its layers and their weights. What was computed with others is of no use: a sequence ends
    # with the weights that it began with, and replicas that differ in them never share it.
    part: Part
    # It takes sequences only where no other replica of its part can.
    is_spare: bool = False
    # Threads that compute a micro-batch beside which no other stage of the machine computes, over
    # those that compute another one.
    gain_alone: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineKnown:
    """The model is known: comes once, before all replicas."""

    facts: PipelineFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaReady:
    """A replica of a stage is open and empty.

    `replica_id` stands for this incarnation: a process that is opened again gets another one.
    """

    replica_id: int
    facts: ReplicaFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLost:
    """A replica is gone with all it held. Unknown ids are ignored."""

    replica_id: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaDraining:
    """A replica shall get no new sequences. `moves`: those it has leave it now for others of the
    same weights, where there are any; else they end where they are."""

    replica_id: int
    moves: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkReady:
    """Activations can travel from one replica to another, which holds the layers behind its own."""

    upstream_id: int
    downstream_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkLost:
    """What was on its way from one replica to another will not arrive. Both may live on."""

    upstream_id: int
    downstream_id: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CutChosen:
    """New sequences take replicas of these parts. Those that have begun end with the weights that
    they began with; where these are the same, they take the new parts when they move. Until one
    says so, the parts of the first replicas that make a whole model are chosen."""

    cut: Cut


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineLost:
    """The coordinator stops: every request ends with Unavailable."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestArrived:
    """A request. `token_ids` is the prompt, and output that was generated elsewhere behind it; the
    scheduler does not change it."""

    request_id: int  # unique for the life of the scheduler
    token_ids: Sequence[int]
    num_output_tokens: int = 0  # of `token_ids`, the last ones: output, and not emitted again
    sampling: SamplingParameters
    deadline_s: float | None = None  # on the clock of `now_s`
    traceparent: str = ""
    # Only requests of equal salt share what was computed for their prompts: a tenant's secret.
    cache_salt: str = ""
    tenant: str = ""  # all of one tenant share what is its share of the mesh
    priority: int = 0  # all of a higher one are admitted first
    # It takes this cut, whether it is chosen or not, and stays on it. None: the one chosen.
    probed: Cut | None = None
    # Whose weights its output came from, where it has some: it goes on with these alone.
    began_on: Cut | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestCancelled:
    """Nobody waits for this request any more. Unknown ids are ignored."""

    request_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensSampled:
    """A micro-batch has left the last replica that takes part in it: one token for each sampled
    row, in order."""

    micro_batch_id: int
    token_ids: Sequence[int]
    # As long as token_ids where any run asked for log probabilities, else empty.
    logprobs: Sequence[PositionLogprobs | None] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReported:
    """How long a replica took for its latest micro-batches, in the order it computed them."""

    replica_id: int
    batch_rows: Sequence[int]
    batch_seconds: Sequence[float]
    performed_id: int = 0  # the latest micro-batch that it has performed or abandoned


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time has passed: look at deadlines. Several a second are enough."""


Event = (
    PipelineKnown
    | PipelineLost
    | ReplicaReady
    | ReplicaLost
    | ReplicaDraining
    | LinkReady
    | LinkLost
    | CutChosen
    | RequestArrived
    | RequestCancelled
    | TokensSampled
    | StageReported
    | Tick
)
