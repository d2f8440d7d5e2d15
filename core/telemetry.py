"""Every metric and span of Penstock: names, units and label sets, as data.

Names follow OpenTelemetry's semantic conventions where they have one (`gen_ai.*`,
`rpc.*`) and are `penstock.*` otherwise. `services/common/telemetry.py` makes
instruments of the rows here; Prometheus sees `penstock.stage.busy` in seconds as
`penstock_stage_busy_seconds_total`.

A bubble is attributed with counters per stage: `busy` (computing; of it `stolen`, while
others had the core) and `starved` (sequences are live or a micro-batch is scheduled, and none
can be computed), by cause. What remains of the wall clock is idleness, and little else. Beside
them, in whatever time it was: `wire` (frames between compute threads) and `serialise`
(activations to frames and back).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an instrument does with the values it is given."""

    COUNTER = "counter"  # only grows; summed
    GAUGE = "gauge"  # read when it is asked for
    HISTOGRAM = "histogram"  # distribution over `buckets`


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric. `unit` is UCUM: s, By, {token}. `labels` are all that may be set on it."""

    name: str
    kind: Kind
    unit: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Span:
    """A span. `attributes` are all that may be set on it."""

    name: str
    description: str
    attributes: tuple[str, ...] = ()


MODEL = "gen_ai.request.model"
OPERATION = "gen_ai.operation.name"
FINISH_REASON = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
STAGE = "penstock.stage.index"
REPLICA = "penstock.replica"  # number of a stage's replica, from 0
CAUSE = "penstock.cause"  # "schedule", "upstream", "wire" or "serialise"
REQUEST_ID = "penstock.request.id"
TOKEN_TYPE = "gen_ai.token.type"  # "input" or "output"
OUTCOME = "penstock.outcome"  # how a request ended: a FinishReason or a refusal's code, lower case

# Sub-millisecond tokens of small models up to minutes in a queue; about two buckets an octave
# where people set targets.
_TOKEN_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5),
)
_LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 120.0),
)
_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

RPC_DURATION = Metric(
    name="rpc.server.call.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="Time an RPC took, from its arrival to its status",
    labels=(RPC_SYSTEM, RPC_METHOD, RPC_STATUS),
    buckets=_LATENCY_BUCKETS_S,
)
TIME_TO_FIRST_TOKEN = Metric(
    name="gen_ai.server.time_to_first_token",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the arrival of a request to its first token",
    labels=(MODEL,),
    buckets=_LATENCY_BUCKETS_S,
)
INTER_TOKEN_LATENCY = Metric(
    name="gen_ai.server.time_per_output_token",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="Time between two consecutive tokens of a request",
    labels=(MODEL,),
    buckets=_TOKEN_BUCKETS_S,
)
REQUEST_DURATION = Metric(
    name="gen_ai.server.request.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the arrival of a request to its end",
    labels=(MODEL, OUTCOME),
    buckets=_LATENCY_BUCKETS_S,
)
QUEUE_DURATION = Metric(
    name="penstock.request.queue.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the arrival of a request to its first scheduled prefill chunk, or to its end",
    labels=(MODEL,),
    buckets=_LATENCY_BUCKETS_S,
)
TOKENS = Metric(
    name="penstock.tokens",
    kind=Kind.COUNTER,
    unit="{token}",
    description="Tokens of prompts (input) and completions (output)",
    labels=(MODEL, TOKEN_TYPE),
)
CACHED_TOKENS = Metric(
    name="penstock.tokens.cached",
    kind=Kind.COUNTER,
    unit="{token}",
    description="Tokens of prompts that had been computed for an earlier request",
    labels=(MODEL,),
)
REQUESTS_ENDED = Metric(
    name="penstock.requests.ended",
    kind=Kind.COUNTER,
    unit="{request}",
    description="Requests that have ended, by outcome",
    labels=(MODEL, OUTCOME),
)
REQUESTS_WAITING = Metric(
    name="penstock.requests.waiting",
    kind=Kind.GAUGE,
    unit="{request}",
    description="Requests that wait for admission",
    labels=(MODEL,),
)
REQUESTS_RUNNING = Metric(
    name="penstock.requests.running",
    kind=Kind.GAUGE,
    unit="{request}",
    description="Requests that hold KV blocks",
    labels=(MODEL,),
)
PREEMPTIONS = Metric(
    name="penstock.requests.preempted",
    kind=Kind.COUNTER,
    unit="{request}",
    description="Times that a running request gave its KV blocks back to be recomputed later",
    labels=(MODEL,),
)
TOKENS_GUESSED = Metric(
    name="penstock.tokens.guessed",
    kind=Kind.COUNTER,
    unit="{token}",
    description="Tokens that were guessed, to be verified beside the next ones",
    labels=(MODEL,),
)
TOKENS_GUESSED_RIGHT = Metric(
    name="penstock.tokens.guessed_right",
    kind=Kind.COUNTER,
    unit="{token}",
    description="Guessed tokens that were those that follow",
    labels=(MODEL,),
)
SEQUENCES_MOVED = Metric(
    name="penstock.sequences.moved",
    kind=Kind.COUNTER,
    unit="{sequence}",
    description="Times that a running sequence went on over another path",
    labels=(MODEL,),
)
POSITIONS_RESTORED = Metric(
    name="penstock.positions.restored",
    kind=Kind.COUNTER,
    unit="{position}",
    description="Positions computed anew on replicas that had lost, or never had, them",
    labels=(MODEL,),
)
KV_BLOCKS_USED = Metric(
    name="penstock.kv.blocks.used",
    kind=Kind.GAUGE,
    unit="{block}",
    description="KV blocks that live sequences hold",
    labels=(MODEL, STAGE, REPLICA),
)
KV_BLOCKS_TOTAL = Metric(
    name="penstock.kv.blocks.total",
    kind=Kind.GAUGE,
    unit="{block}",
    description="KV blocks in all",
    labels=(MODEL, STAGE, REPLICA),
)
STAGE_BUSY = Metric(
    name="penstock.stage.busy",
    kind=Kind.COUNTER,
    unit="s",
    description="Time that a stage spent computing",
    labels=(MODEL, STAGE),
)
STAGE_STARVED = Metric(
    name="penstock.stage.starved",
    kind=Kind.COUNTER,
    unit="s",
    description="Time with live sequences and no micro-batch that could be computed, by cause",
    labels=(MODEL, STAGE, CAUSE),
)
RETURN_WIRE = Metric(
    name="penstock.coordinator.return.wire",
    kind=Kind.COUNTER,
    unit="s",
    description="Time of sampled tokens from the last stage's hands to the coordinator's",
    labels=(MODEL,),
)
STAGE_STOLEN = Metric(
    name="penstock.stage.stolen",
    kind=Kind.COUNTER,
    unit="s",
    description="Of the time spent computing, that in which others had the core",
    labels=(MODEL, STAGE),
)
STAGE_WIRE = Metric(
    name="penstock.stage.wire",
    kind=Kind.COUNTER,
    unit="s",
    description="Time of frames from leaving the compute thread to being handed to the socket",
    labels=(MODEL, STAGE),
)
STAGE_SERIALISE = Metric(
    name="penstock.stage.serialise",
    kind=Kind.COUNTER,
    unit="s",
    description="Time spent turning activations into frames and back",
    labels=(MODEL, STAGE),
)
STAGE_ROWS = Metric(
    name="penstock.stage.rows",
    kind=Kind.COUNTER,
    unit="{row}",
    description="Rows that a stage has computed",
    labels=(MODEL, STAGE),
)
STAGE_MICRO_BATCHES = Metric(
    name="penstock.stage.micro_batches",
    kind=Kind.COUNTER,
    unit="{micro_batch}",
    description="Micro-batches that a stage has computed",
    labels=(MODEL, STAGE),
)
STAGE_WEIGHTS = Metric(
    name="penstock.stage.weights",
    kind=Kind.GAUGE,
    unit="By",
    description="Bytes of weights that a stage holds in memory",
    labels=(MODEL, STAGE),
)
WEIGHTS_CHECKED = Metric(
    name="penstock.stage.weights.checked",
    kind=Kind.COUNTER,
    unit="By",
    description="Bytes of weights in memory that were hashed again",
    labels=(MODEL, STAGE),
)
WEIGHTS_DAMAGED = Metric(
    name="penstock.stage.weights.damaged",
    kind=Kind.GAUGE,
    unit="{stage}",
    description="1 once weights in memory have been found changed, and the stage serves no more",
    labels=(MODEL, STAGE),
)
MICRO_BATCH_ROWS = Metric(
    name="penstock.micro_batch.rows",
    kind=Kind.HISTOGRAM,
    unit="{row}",
    description="Rows of the micro-batches that were scheduled",
    labels=(MODEL,),
    buckets=_ROW_BUCKETS,
)
MICRO_BATCHES_IN_FLIGHT = Metric(
    name="penstock.micro_batches.in_flight",
    kind=Kind.GAUGE,
    unit="{micro_batch}",
    description="Micro-batches that have been scheduled and not returned",
    labels=(MODEL,),
)

METRICS: tuple[Metric, ...] = tuple(row for row in list(globals().values()) if type(row) is Metric)

GENERATE_SPAN = Span(
    name="generate",
    description="A request in the gateway, from its arrival to its last message",
    attributes=(
        OPERATION,
        MODEL,
        INPUT_TOKENS,
        OUTPUT_TOKENS,
        FINISH_REASON,
        *(f"gen_ai.request.{name}" for name in ("max_tokens", "temperature", "top_k", "top_p")),
        *(f"gen_ai.request.{name}" for name in ("presence_penalty", "frequency_penalty", "seed")),
    ),
)
QUEUE_SPAN = Span(
    name="queue",
    description="A request in the coordinator, waiting for admission",
    attributes=(REQUEST_ID,),
)
PREFILL_SPAN = Span(
    name="prefill",
    description="From the first scheduled prefill chunk to the first token",
    attributes=(REQUEST_ID, INPUT_TOKENS),
)
DECODE_SPAN = Span(
    name="decode",
    description="From the first token to the last",
    attributes=(REQUEST_ID, OUTPUT_TOKENS, FINISH_REASON),
)
COMPUTE_SECONDS = "penstock.stage.compute_seconds"
WAIT_SECONDS = "penstock.stage.wait_seconds"
WIRE_SECONDS = "penstock.stage.wire_seconds"
SEQUENCE_ROWS = "penstock.stage.rows"
SEQUENCE_MICRO_BATCHES = "penstock.stage.micro_batches"
STAGE_SPAN = Span(
    name="stage",
    description="A sequence in a stage, from its start to its end: one span, however many tokens",
    attributes=(
        *(STAGE, REQUEST_ID, COMPUTE_SECONDS, WAIT_SECONDS, WIRE_SECONDS),
        *(SEQUENCE_ROWS, SEQUENCE_MICRO_BATCHES),
    ),
)

SPANS: tuple[Span, ...] = tuple(row for row in list(globals().values()) if type(row) is Span)
